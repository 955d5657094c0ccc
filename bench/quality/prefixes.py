"""Our own prefixes, and the paper's ablations of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, cycle, islice

import torch
from jobs import Job
from methods import Base, Method
from texts import Texts
from torch import Tensor, nn

from prefixd_train import ablations
from prefixd_train.ablations import EmbeddingPrefix
from prefixd_train.batching import IGNORED, Batch
from prefixd_train.initialise import activations_of_tokens, from_words
from prefixd_train.inject import target_logits
from prefixd_train.objective import target_nll
from prefixd_train.parameterise import PrefixParameters, make_prefix
from prefixd_train.save import fold
from prefixd_train.sites import PrefixKV

__all__ = ["WORDS", "EmbeddingOnly", "Infix", "Prefix"]

WORDS = "table-to-text:"
"""the task's words, as the paper starts from them"""
INSTRUCTION = "Describe the restaurant in one sentence, using this data:"
"""words of E2E's task that tell an instructed LM what to do"""


class Prefix(Method):
    """``prefix-<direct | mlp>-<words | instruction | text | random>``; with ``-frozen`` the first
    virtual token, where the LM's attention rests, stays as it starts"""

    def __init__(self, base: Base, job: Job, texts: Texts) -> None:
        super().__init__(base, job, texts)
        self.prefix = self.start().to(base.device)

    def start(self) -> PrefixParameters:
        _, parameterisation, start, *frozen = self.job.method.split("-")
        lm, lengths = self.base.lm, {"decoder": self.job.length}
        prefix = make_prefix(lm.shapes, lengths, parameterisation, frozen_first=len(frozen))
        if start in ("words", "instruction"):
            words = WORDS if start == "words" else INSTRUCTION
            prefix.set_kv(from_words(lm, words, lengths))
        elif start == "text":
            tokens = chain.from_iterable(chain(*example) for example in cycle(self.texts.train))
            prefix.set_kv(activations_of_tokens(lm, list(islice(tokens, self.job.length))))
        return prefix

    def parameters(self) -> list[nn.Parameter]:
        return list(self.prefix.parameters())

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        found = target_logits(self.base.lm, batch, self.prefix())
        return target_nll(found.logits, found.targets)

    def kv(self) -> PrefixKV:
        return fold(self.prefix)

    def bytes_per_task(self) -> int:
        # What trained it, the MLP, is not kept.
        return 4 * sum(tensor.numel() for tensor in self.kv()["decoder"])


class EmbeddingOnly(Prefix):
    def start(self) -> PrefixParameters:
        prefix = EmbeddingPrefix(self.base.lm, self.job.length)
        words = self.base.tokenizer(WORDS, add_special_tokens=False).input_ids
        prefix.set_tokens(list(islice(cycle(words), self.job.length)))
        return prefix


class Infix(Prefix):
    """[x; INFIX; y]. It is decoded without a cache, for an ablation need not be fast."""

    def start(self) -> PrefixParameters:
        return ablations.Infix(super().start())

    @torch.inference_mode()
    def decode(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        kv = self.kv()
        made: list[list[int]] = []
        for start in range(0, len(prompts), 50):
            made += self._decode(prompts[start : start + 50], kv)
        return made

    def _decode(self, prompts: Sequence[Sequence[int]], kv: PrefixKV) -> list[list[int]]:
        eos = self.base.tokenizer.eos_token_id
        made: list[list[int]] = [[] for _ in prompts]
        for _ in range(self.job.max_new_tokens):
            following = self._following(
                [[*p, *m] for p, m in zip(prompts, made, strict=True)],
                [len(p) for p in prompts],
                kv,
            )
            for row, token in zip(made, following, strict=True):
                if eos not in row:
                    row.append(token)
            if all(eos in row for row in made):
                break
        return [row[: row.index(eos)] if eos in row else row for row in made]

    def _following(self, rows: list[list[int]], starts: list[int], kv: PrefixKV) -> list[int]:
        width = max(map(len, rows)) + 1
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        mask = torch.zeros_like(ids)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row) + 1] = 1
            # What the labels are is of no account: they say where y begins and what to predict.
            labels[i, start : len(row) + 1] = 0
        batch = Batch(ids, mask, labels).to(self.device)
        found = target_logits(self.base.lm, batch, kv)
        last = torch.bincount(found.examples, minlength=len(rows)).cumsum(0) - 1
        return [int(token) for token in found.logits[last].argmax(-1)]
