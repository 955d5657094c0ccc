"""The teacher of a distillation: the LM with the document in its context, kept on disk.

Its answers and what it says of their tokens are computed once, before the first step::

    teacher/examples.jsonl     prompt, answer, and the tokens of both
    teacher/top_ids.npy        [N, k] int32, a row for each token of the answers
    teacher/top_logprobs.npy   [N, k + 1] float32, the last column of all other tokens together
    teacher/digests.json       SHA-256 of these files

The folder is written under another name and renamed, so it is whole or absent.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from prefixd_train.batching import Batch, Collator
from prefixd_train.checkpoint import publish_folder
from prefixd_train.continuation import continuation, greedy
from prefixd_train.data import Example, Examples, file_sha256, read_rows
from prefixd_train.errors import TrainError
from prefixd_train.inject import target_logits
from prefixd_train.lm import FrozenLM
from prefixd_train.questions import Question, ends_line
from prefixd_train.sites import PrefixKV
from prefixd_train.top_k import TopK, top_k_divergence, top_k_of

__all__ = ["Teacher", "write_teacher"]

_EXAMPLES, _IDS, _LOGPROBS = "examples.jsonl", "top_ids.npy", "top_logprobs.npy"
_DIGESTS = "digests.json"


class Teacher:
    """``examples.lines`` number the examples from 1, as the lines of the file."""

    def __init__(self, folder: Path) -> None:
        """Raises TrainError where a file is not what was written."""
        self.digests: dict[str, str] = json.loads((folder / _DIGESTS).read_text())
        for name, digest in self.digests.items():
            if file_sha256(folder / name) != digest:
                raise TrainError(f"{folder / name} has changed since the teacher wrote it")
        self.examples = _read_examples(folder / _EXAMPLES)
        # Mapped, not read: a long list of questions need not fit in memory.
        self._ids = np.load(folder / _IDS, mmap_mode="r")
        self._logprobs = np.load(folder / _LOGPROBS, mmap_mode="r")
        self._ends = list(accumulate(_target_lengths(self.examples), initial=0))

    def rows(self, lines: Sequence[int], device: torch.device) -> TopK:
        """Of the answers of these examples, one after the other."""
        parts = [slice(self._ends[line - 1], self._ends[line]) for line in lines]
        ids = np.concatenate([self._ids[part] for part in parts]).astype(np.int64)
        logprobs = np.concatenate([self._logprobs[part] for part in parts])
        return TopK(torch.from_numpy(ids).to(device), torch.from_numpy(logprobs).to(device))

    def divergence(self, lm: FrozenLM, batch: Batch, prefix: PrefixKV | None) -> tuple[Tensor, int]:
        """The objective: Σ KL(LM with the document ‖ LM with the prefix) over the answers."""
        logits, targets, _ = target_logits(lm, batch, prefix)
        teacher = self.rows(batch.lines, logits.device)
        return top_k_divergence(logits, teacher), targets.numel()


def write_teacher(
    folder: Path,
    lm: FrozenLM,
    document: PrefixKV,
    questions: Iterable[Question],
    *,
    top_k: int,
    answer_tokens: int,
    batch_size: int,
) -> None:
    """``document``: its keys and values, as a prefix that stands for it token by token."""
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():  # a kill has left it
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    _write_examples(partial / _EXAMPLES, lm, document, questions, answer_tokens)
    examples = _read_examples(partial / _EXAMPLES)
    _write_top_k(partial, lm, document, examples, top_k, batch_size)
    digests = {name: file_sha256(partial / name) for name in (_EXAMPLES, _IDS, _LOGPROBS)}
    (partial / _DIGESTS).write_text(json.dumps(digests, indent=2) + "\n")
    publish_folder(partial, folder)


def _write_examples(
    path: Path,
    lm: FrozenLM,
    document: PrefixKV,
    questions: Iterable[Question],
    answer_tokens: int,
) -> None:
    is_end = ends_line(lm)
    with path.open("w") as file:
        for prompt, source, given in questions:
            target = given or continuation(
                lm, document, source, greedy, is_end, max_new_tokens=answer_tokens
            )
            row = {
                "prompt": prompt,
                "answer": lm.tokenizer.decode(target, skip_special_tokens=True),
                "source": list(source),
                "target": list(target),
            }
            print(json.dumps(row, ensure_ascii=False), file=file)


def _read_examples(path: Path) -> Examples:
    examples = Examples()
    for row in read_rows(path):
        prompt, source, target = (row.fields[name] for name in ("prompt", "source", "target"))
        examples.add(Example(source, target), row.line)
        examples.shortest_prompt = min(examples.shortest_prompt or prompt, prompt, key=len)
    return examples


@torch.no_grad()
def _write_top_k(
    folder: Path,
    lm: FrozenLM,
    document: PrefixKV,
    examples: Examples,
    top_k: int,
    batch_size: int,
) -> None:
    count, collate = examples.num_targets, Collator.of(lm)
    ids = open_memmap(folder / _IDS, "w+", np.int32, (count, top_k))
    logprobs = open_memmap(folder / _LOGPROBS, "w+", np.float32, (count, top_k + 1))
    done = 0
    for start in range(0, len(examples), batch_size):
        some = range(start, min(start + batch_size, len(examples)))
        batch = collate([examples[index] for index in some]).to(lm.device)
        found = top_k_of(target_logits(lm, batch, document).logits, top_k)
        rows = slice(done, done + len(found.ids))
        ids[rows], logprobs[rows] = found.ids.cpu().numpy(), found.logprobs.cpu().numpy()
        done = rows.stop
    ids.flush()
    logprobs.flush()


def _target_lengths(examples: Examples) -> list[int]:
    return [len(examples[index].target) for index in range(len(examples))]
