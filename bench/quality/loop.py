"""One loop for all methods: the same batches in the same order, optimiser, schedule and loss."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import torch
from methods import Method
from torch.nn.utils import clip_grad_norm_

from prefixd_train.batching import Collator, epoch_batches
from prefixd_train.data import Example

__all__ = ["Trained", "dev_loss", "train"]

WARMUP = 0.05
"""of all steps; then the rate falls in a line to 0"""
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Trained:
    cpu_seconds: float
    """of all threads together: another process beside this one does not change it much"""
    losses: list[float]
    """of each step, nats a target token"""


def train(
    method: Method,
    examples: Sequence[Example],
    collate: Collator,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> Trained:
    parameters = method.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup)),
    )
    losses = []
    start = time.process_time()
    for rows in islice(_batches(examples, batch_size, seed), steps):
        total, num_targets = method.loss(collate([examples[i] for i in rows]).to(method.device))
        loss = total / num_targets
        loss.backward()
        clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Trained(time.process_time() - start, losses)


def _batches(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[list[int]]:
    lengths = [len(example.source) + len(example.target) for example in examples]
    for epoch in count():
        yield from epoch_batches(lengths, batch_size, seed=seed, epoch=epoch)


@torch.no_grad()
def dev_loss(
    method: Method, examples: Sequence[Example], collate: Collator, batch_size: int = 16
) -> float:
    """Nats a target token."""
    ordered = sorted(examples, key=lambda example: len(example.source))
    total, num_targets = 0.0, 0
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size]).to(method.device)
        nats, number = method.loss(batch)
        total += nats.item()
        num_targets += number
    return total / num_targets
