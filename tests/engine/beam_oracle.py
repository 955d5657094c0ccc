"""transformers' beam search over a language model that is a hash: any logits for any tokens."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

PROMPT = (1, 2, 1)


def hash_logits(seed: int, vocab: int, tokens: tuple[int, ...]) -> Tensor:
    """[V] float32; the same for the same tokens, whoever asks."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {tokens}").getrandbits(60))
    return torch.randn(vocab, generator=generator) * 2.0


class HashConfig(PretrainedConfig):
    model_type = "hash"


class HashLM(PreTrainedModel, GenerationMixin):
    config_class = HashConfig
    main_input_name = "input_ids"

    def __init__(self, seed: int, vocab: int) -> None:
        super().__init__(HashConfig(vocab_size=vocab, use_cache=False))
        self.seed, self.vocab = seed, vocab
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # tells generate the device

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutput:
        rows = [hash_logits(self.seed, self.vocab, tuple(row)) for row in input_ids.tolist()]
        return CausalLMOutput(logits=torch.stack(rows)[:, None])

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}


def reference_search(
    seed: int, vocab: int, *, num_beams: int, eos: list[int], **options: Any
) -> list[tuple[list[int], float]]:
    """(tokens, score) of each of the ``num_beams`` best, best first, as transformers finds them."""
    pad = vocab  # no token of the model's: what follows the end is told from it
    output = HashLM(seed, vocab).generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        eos_token_id=eos or None,
        pad_token_id=pad,
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    rows = output.sequences[:, len(PROMPT) :].tolist()
    tokens = [[token for token in row if token != pad] for row in rows]
    return list(zip(tokens, output.sequences_scores.tolist(), strict=True))
