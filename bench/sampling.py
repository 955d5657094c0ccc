"""Milliseconds that one step's sampling takes, for each kind of row and batch size.

Logits are peaked as a language model's are (a few hundred likely tokens over a flat tail). Printed
is the best of several runs after a warm-up.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from prefixd_server.engine.sampling import Sampler
from prefixd_server.types import SamplingParams

VOCAB = 49_152
BATCHES = (1, 32, 128)
CASES = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.8),
    "top_k=50": SamplingParams(temperature=0.8, top_k=50),
    "top_p=0.9": SamplingParams(temperature=0.8, top_p=0.9),
    "all penalties": SamplingParams(
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias=tuple((token, 1.0) for token in range(32)),
        min_new_tokens=1000,
    ),
    "top_n_tokens=5": SamplingParams(top_n_tokens=5),
}


@dataclass
class Row:
    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


def make_rows(params: SamplingParams, batch: int) -> list[Row]:
    """Each in the middle of its life: 256 tokens of prompt, 64 of output."""
    prompt, output = tuple(range(1000, 1256)), list(range(2000, 2064))
    return [Row(replace(params, seed=i), prompt, output) for i in range(batch)]


def make_logits(batch: int, device: str) -> torch.Tensor:
    logits = torch.randn(batch, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[:, :300] += torch.linspace(14, 6, 300)
    shuffled = logits[:, torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))]
    return shuffled.contiguous().to(device)


def best_ms(step: Callable[[], object], runs: int = 15) -> float:
    step()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sampler = Sampler(VOCAB, frozenset({0}), arguments.device)
    print(f"ms per step, V={VOCAB}, {arguments.device}, {arguments.threads} threads")
    print(f"{'':16}" + "".join(f"{f'B={batch}':>10}" for batch in BATCHES))
    for name, params in CASES.items():
        line = f"{name:16}"
        for batch in BATCHES:
            logits, rows = make_logits(batch, arguments.device), make_rows(params, batch)
            line += f"{best_ms(partial(sampler.sample, logits, rows)):10.2f}"
        print(line)


if __name__ == "__main__":
    main()
