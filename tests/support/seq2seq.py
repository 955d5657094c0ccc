"""Tiny random encoder-decoders, prefixes for their three sites, and what must come out of them.

The reference is transformers' own ``generate`` with the model's eager attention, where one function
is put around attention that prepends each layer's prefix keys and values, as the paper's BART code
and AdapterHub do. It shares no code with the server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    DynamicCache,
    EncoderDecoderCache,
    MarianConfig,
    MBartConfig,
    MT5Config,
    PegasusConfig,
    T5Config,
)

from prefixd_store import PrefixArray, write_prefix
from prefixd_store.format import validate_file
from tests.support.engine import EngineRun
from tests.support.models import demo_folder

Prefix = Mapping[str, tuple[Tensor, Tensor]]
"""site -> keys and values [L, H, P, D]"""

_BART = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}

FAMILIES: dict[str, Callable[[int], Any]] = {
    "t5": lambda vocab: T5Config(vocab_size=vocab, **_T5),
    "mt5": lambda vocab: MT5Config(
        vocab_size=vocab, **_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    ),
    "bart": lambda vocab: BartConfig(vocab_size=vocab, **_BART),
    "mbart": lambda vocab: MBartConfig(vocab_size=vocab, **_BART),
    "pegasus": lambda vocab: PegasusConfig(vocab_size=vocab, **_BART),
    "marian": lambda vocab: MarianConfig(vocab_size=vocab, **_BART, scale_embedding=True),
}

_REFERENCE = "prefixd-tests-reference"


_GENERATION: dict[str, dict[str, Any]] = {
    # What the families' own checkpoints have in generation_config.json.
    "bart": {"forced_bos_token_id": 0, "forced_eos_token_id": 2},
    "mbart": {"forced_bos_token_id": 777, "forced_eos_token_id": 2},
    "pegasus": {"forced_eos_token_id": 2},
    "marian": {"forced_eos_token_id": 2, "bad_words_ids": [[1]]},
}


def tiny_seq2seq_folder(family: str, folder: Path, **changes: Any) -> Path:
    """A random model of ``family`` saved with the demo's tokenizer; ``changes`` to its config."""
    tokenizer = AutoTokenizer.from_pretrained(demo_folder())
    torch.manual_seed(0)
    config = FAMILIES[family](len(tokenizer))
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed_positions" not in name:
                parameter.normal_(std=0.3)
            if "embed_positions" in name and parameter.requires_grad:
                parameter.normal_(std=0.5)
            if name.endswith(".q.weight"):
                # T5 does not scale scores down: wide ones would blow float32's rounding up.
                parameter.normal_(std=0.1)
            if "relative_attention_bias" in name or (family == "t5" and "shared" in name):
                # T5 scales its hidden states down before the output layer.
                parameter.normal_(std=1.0)
    for name, value in _GENERATION.get(family, {}).items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_prefix(model: Any, lengths: Mapping[str, int], seed: int) -> Prefix:
    """Keys and values of the size that the model's own have; ``lengths``: site -> P."""
    config = model.config
    encoder, decoder = model.get_encoder().config, model.get_decoder().config
    heads = config.num_attention_heads
    dim = getattr(config, "d_kv", config.hidden_size // heads)
    layers = {
        "encoder": getattr(encoder, "encoder_layers", encoder.num_hidden_layers),
        "decoder": getattr(decoder, "decoder_layers", decoder.num_hidden_layers),
    }
    layers["cross"] = layers["decoder"]
    generator = torch.Generator().manual_seed(seed)
    return {
        site: tuple(  # type: ignore[misc]
            torch.randn(layers[site], heads, length, dim, generator=generator) for _ in range(2)
        )
        for site, length in lengths.items()
    }


def publish(
    run: EngineRun, task: str, prefix: Prefix, scratch: Path, *, query_offset: int = 0
) -> None:
    blob = scratch / f"{task}.safetensors"
    tensors = {
        f"{site}.{part}": PrefixArray.of(np.ascontiguousarray(tensor.numpy()))
        for site, pair in prefix.items()
        for part, tensor in zip(("key", "value"), pair, strict=True)
    }
    sha256 = write_prefix(blob, tensors, query_offset=query_offset)
    version = validate_file(blob).version_record(sha256, blob.stat().st_size)
    run.server.registry.publish("default", task, blob, version)


class Seq2SeqReference:
    """``generate`` of one text alone, greedy, with a prefix at any of the three sites."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
        name = f"{_REFERENCE}-{id(self)}"
        AttentionInterface.register(name, self._attend)
        self.model.set_attn_implementation(name)
        self._prefix: Prefix = {}
        self._behind = False
        self._sites: dict[int, tuple[str, int]] = {}
        for stack, names in (
            (self.model.get_encoder(), {"self_attn": "encoder", "SelfAttention": "encoder"}),
            (
                self.model.get_decoder(),
                {
                    "self_attn": "decoder",
                    "SelfAttention": "decoder",
                    "encoder_attn": "cross",
                    "EncDecAttention": "cross",
                },
            ),
        ):
            count: Counter[str] = Counter()
            for name, module in stack.named_modules():
                site = names.get(name.rpartition(".")[2])
                if site is not None:
                    self._sites[id(module)] = (site, count[site])
                    count[site] += 1
        self._tables = {
            site: getattr(_first_block(stack), "SelfAttention", None)
            for site, stack in (
                ("encoder", self.model.get_encoder()),
                ("decoder", self.model.get_decoder()),
            )
        }

    @torch.inference_mode()
    def generate(
        self, prefix: Prefix, text: list[int], max_new_tokens: int, *, behind: bool = False
    ) -> tuple[list[int], list[float]]:
        """Tokens after the decoder's start, and the log-probability of each. ``behind`` (T5): each
        side counts its queries from its own prefix's end on, not from 0."""
        ids = torch.tensor([text])
        with self._injected(prefix, behind):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                # Its own default has as many layers as the encoder.
                past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = output.sequences[0].tolist()[1:]
        logprobs = [
            torch.log_softmax(logits[0].float(), -1)[token].item()
            for logits, token in zip(output.logits, tokens, strict=True)
        ]
        return tokens, logprobs

    @torch.inference_mode()
    def search(
        self, prefix: Prefix, text: list[int], **options: Any
    ) -> list[tuple[list[int], float]]:
        """Beam search: tokens after the decoder's start and score of each hypothesis returned."""
        ids = torch.tensor([text])
        ends = self.model.generation_config.eos_token_id
        with self._injected(prefix):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
                return_dict_in_generate=True,
                output_scores=True,
                **options,
            )
        rows = [row[1:] for row in output.sequences.tolist()]
        tokens = [row[: row.index(ends) + 1] if ends in row else row for row in rows]
        return list(zip(tokens, output.sequences_scores.tolist(), strict=True))

    @contextmanager
    def _injected(self, prefix: Prefix, behind: bool = False) -> Iterator[None]:
        self._prefix, self._behind = prefix, behind
        try:
            yield
        finally:
            self._prefix, self._behind = {}, False

    def _attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float = 1.0,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query [B, H, Q, D], key [B, H, K, D]: all that is cached and new. No mask is asked for:
        the batch is one text or its beams, and of the decoder's new tokens there is one a call."""
        assert query.shape[2] == 1 or not module.is_causal
        site, layer = self._sites[id(module)]
        num_queries, past = query.shape[2], key.shape[2] - query.shape[2]
        if site in self._prefix:
            prefix_key, prefix_value = (
                tensor[layer].expand(len(key), -1, -1, -1) for tensor in self._prefix[site]
            )
            key = torch.cat([prefix_key, key], 2)
            value = torch.cat([prefix_value, value], 2)
        scores = query @ key.transpose(2, 3) * scaling
        table = self._tables.get(site)
        if table is not None:
            # AdapterHub: keys count from the prefix's first on, queries from the text's first on.
            memory, context = torch.arange(key.shape[2]), torch.arange(num_queries) + past
            if self._behind and site in self._prefix:
                context += self._prefix[site][0].shape[2]
            buckets = table._relative_position_bucket(
                memory[None] - context[:, None],
                bidirectional=site == "encoder",
                num_buckets=table.relative_attention_num_buckets,
                max_distance=table.relative_attention_max_distance,
            )
            scores = scores + table.relative_attention_bias(buckets).permute(2, 0, 1)[None]
        return (torch.softmax(scores, -1) @ value).transpose(1, 2), None


def _first_block(stack: Any) -> Any:
    return stack.block[0].layer[0] if hasattr(stack, "block") else None
