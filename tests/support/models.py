"""Models for tests: tiny random ones with the demo's tokenizer, the demo itself, PEFT on either.

Nothing comes from a hub. A tiny model's weights are drawn wider than usual, so that its logits
differ enough for greedy choices to mean something.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GPT2Config, LlamaConfig

from prefixd_server.models.demo import demo_model_folder

CACHE = Path("~/.cache/prefixd").expanduser()

TINY: dict[str, Callable[[int], Any]] = {
    "llama": lambda vocab: LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt2": lambda vocab: GPT2Config(
        vocab_size=vocab,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=4096,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def demo_folder() -> Path:
    return demo_model_folder(CACHE)


def tiny_model_folder(family: str, folder: Path) -> Path:
    """A random model of ``family`` saved with the demo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(demo_folder())
    return save_random_model(TINY[family](len(tokenizer)), tokenizer, folder)


def save_random_model(config: Any, tokenizer: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_base(model_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


def save_peft_prefix(
    base: Any, folder: Path, *, num_virtual_tokens: int, seed: int, cartridge: bool = False
) -> Path:
    """A checkpoint of PEFT's own making. Its values are the model's KV of random tokens with some
    noise: of the size that a trained prefix has, which matters for float32's rounding."""
    kind = CartridgeConfig if cartridge else PrefixTuningConfig
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)
    model = get_peft_model(base, config)
    values = _kv_rows(base, num_virtual_tokens, seed)
    model.prompt_encoder["default"].load_prompt_embeddings(values)
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def _kv_rows(base: Any, num_tokens: int, seed: int) -> torch.Tensor:
    """[P, L * 2 * H_kv * D], laid out as PEFT's ``prompt_embeddings``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, base.config.vocab_size, (1, num_tokens), generator=generator)
    # A cache that is told of the model's sliding windows would forget the first tokens.
    cache = DynamicCache()
    base(input_ids=ids, past_key_values=cache, use_cache=True)
    rows = [
        tensor[0].transpose(0, 1).flatten(1)  # [H_kv, P, D] -> [P, H_kv * D]
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    ]
    values = torch.cat(rows, dim=1)
    return values + 0.05 * values.std() * torch.randn(values.shape, generator=generator)


class Reference:
    """transformers and PEFT on the same weights: the oracle for tokens and log-probabilities."""

    def __init__(self, model_folder: Path) -> None:
        self._base = load_base(model_folder)
        self._folder = model_folder
        self._peft: dict[str, PeftModel] = {}
        self._names: dict[str, dict[Path, str]] = {}

    @torch.inference_mode()
    def generate(
        self, prefix: Path | None, prompt: list[int], max_new_tokens: int
    ) -> tuple[list[int], list[float]]:
        """Greedy tokens, and the log-probability of each, of one prompt run alone."""
        model = self._base if prefix is None else self._with_prefix(prefix)
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
        )
        tokens = output.sequences[0].tolist()[len(prompt) :]
        logprobs = [
            torch.log_softmax(logits[0].float(), -1)[token].item()
            for logits, token in zip(output.logits, tokens, strict=True)
        ]
        return tokens, logprobs

    @torch.inference_mode()
    def search(
        self, prefix: Path | None, prompt: list[int], *, eos_token_id: list[int], **options: Any
    ) -> list[tuple[list[int], float]]:
        """Beam search: (tokens, score) of each hypothesis returned, best first."""
        model = self._base if prefix is None else self._with_prefix(prefix)
        ids = torch.tensor([prompt])
        # No end of sequence is padding, so what follows one can be told from it.
        pad = next(token for token in range(1000) if token not in eos_token_id)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            eos_token_id=eos_token_id,
            pad_token_id=pad,
            **options,
        )
        rows = output.sequences[:, len(prompt) :].tolist()
        tokens = [_until(row, eos_token_id) for row in rows]
        return list(zip(tokens, output.sequences_scores.tolist(), strict=True))

    def _with_prefix(self, prefix: Path) -> PeftModel:
        # One PeftModel holds many adapters of one kind, and of one kind only.
        kind = json.loads((prefix / "adapter_config.json").read_text())["peft_type"]
        names = self._names.setdefault(kind, {})
        if prefix not in names:
            names[prefix] = f"p{len(names)}"
            if kind in self._peft:
                self._peft[kind].load_adapter(str(prefix), adapter_name=names[prefix])
            else:
                base = load_base(self._folder)
                self._peft[kind] = PeftModel.from_pretrained(
                    base, prefix, adapter_name=names[prefix]
                ).eval()
        self._peft[kind].set_adapter(names[prefix])
        return self._peft[kind]


def _until(tokens: list[int], ends: list[int]) -> list[int]:
    """Up to the first of ``ends``, with it."""
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]
