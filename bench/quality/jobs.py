"""What is compared: the methods, the jobs of each size, the learning rates that are tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

__all__ = ["LEARNING_RATES", "METHODS", "SIZES", "Job", "Size", "chosen_lr"]

LEARNING_RATES = {
    "prefix-mlp-words": (5e-4, 1e-3, 2.5e-4),
    "prefix-mlp-words-frozen": (1e-3, 5e-4),
    "prefix-mlp-instruction": (5e-4, 1e-3),
    "prefix-mlp-text": (5e-4, 1e-3),
    "prefix-mlp-random": (1e-3, 5e-4),
    "prefix-direct-words": (3e-2, 1e-2, 1e-1),
    "prefix-direct-words-frozen": (1e-1, 3e-2),
    "prefix-direct-text": (1e-2, 3e-3),
    "prefix-direct-random": (1e-2, 3e-2),
    "embedding-only": (1e-2, 3e-2),
    "infix-mlp-words": (5e-4, 1e-3),
    "peft-prefix": (3e-2, 1e-1, 1e-2),
    "peft-prompt": (1e-1, 3e-2, 3e-1),
    "peft-lora": (1e-2, 3e-3, 3e-2),
    "peft-ia3": (3e-2, 1e-1, 1e-2, 3e-3),
    "peft-loha": (1e-3, 3e-3),
    "fine-tuning": (1e-4, 2e-4, 5e-5, 2e-5),
    "top-2-layers": (1e-3, 3e-3, 3e-4, 1e-4),
}
"""Of each trained method those tried on the dev set; the first is taken where none was tried."""

UNTRAINED = ("zero-shot", "in-context")
METHODS = (*UNTRAINED, *LEARNING_RATES)

_PEERS = ("peft-prefix", "peft-prompt", "peft-lora", "peft-ia3", "fine-tuning", "top-2-layers")
# Direct and random is what `peft-prefix` is too.
_OURS = ("prefix-mlp-words", "prefix-direct-words", "prefix-mlp-random")
_TUNED = ("prefix-mlp-words", "prefix-direct-words", *_PEERS)
_COMPARED = ("prefix-mlp-words", "peft-prefix", "peft-prompt")


@dataclass(frozen=True)
class Job:
    """One training and its evaluation: the same fields, the same result."""

    method: str
    dataset: str = "e2e"
    n: int | None = 100
    """training examples, one reference each; None: all inputs with all references"""
    seed: int = 0
    length: int = 10
    """virtual tokens, where the method has them"""
    steps: int = 120
    batch_size: int = 4
    lr: float | None = None
    """None: the best one of those tried, or the method's first"""
    num_test: int | None = None
    """test inputs, the same for all jobs; None: all; 0: only the loss on the dev set"""
    max_new_tokens: int = 64

    @property
    def key(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


@dataclass(frozen=True)
class Size:
    what: str
    jobs: tuple[Job, ...]


def _trained(methods: tuple[str, ...], seeds: tuple[int, ...], **fields: Any) -> Iterator[Job]:
    # Seed by seed, so that what is there when a run is stopped compares all methods.
    for seed, method in product(seeds, methods):
        yield Job(method, seed=seed, **fields)


def _smoke() -> Iterator[Job]:
    tiny = Job("", n=8, steps=2, batch_size=2, num_test=3, max_new_tokens=8, length=4)
    for method in METHODS:
        yield replace(tiny, method=method)
    yield replace(tiny, method="prefix-mlp-words", dataset="webnlg")


def _tune() -> Iterator[Job]:
    for method in _TUNED:
        for lr in LEARNING_RATES[method]:
            yield Job(method, lr=lr, steps=45, num_test=0)


def _cpu() -> Iterator[Job]:
    yield from _starts()
    for seed in (0, 1, 2):
        yield from _trained(_COMPARED, (seed,), n=500)
    others = ("peft-lora", "fine-tuning", "top-2-layers", "peft-ia3")
    yield from _trained(others, (0, 1, 2), n=500)
    yield Job("zero-shot", n=0)
    yield Job("in-context", n=4)
    yield from _trained(("prefix-direct-words",), (0, 1, 2), n=500)
    yield from (Job("prefix-mlp-words", n=500, length=length) for length in (1, 5, 20, 40))
    webnlg: dict[str, Any] = {"dataset": "webnlg", "num_test": 400}
    methods = ("prefix-mlp-words", "prefix-direct-words", "peft-prefix", "peft-lora", "fine-tuning")
    yield from _trained(methods, (0,), n=500, **webnlg)
    yield Job("zero-shot", n=0, **webnlg)
    yield Job("in-context", n=4, **webnlg)


def _starts() -> Iterator[Job]:
    """With few examples: both starts at the same rates, from one far too low to the better one of
    random; other starts; how far 20 steps come."""
    for lr in (5e-4, 1e-4, 1e-3):
        yield from _trained(("prefix-mlp-words", "prefix-mlp-random"), (0, 1, 2), lr=lr)
    yield Job("prefix-mlp-words-frozen", lr=1e-3)
    yield Job("prefix-mlp-instruction", lr=5e-4)
    for seed in (0, 1, 2):
        yield Job("prefix-mlp-words", seed=seed, steps=20, lr=5e-4)
        yield Job("prefix-mlp-random", seed=seed, steps=20, lr=1e-3)
    direct = ("prefix-direct-random", "prefix-direct-words")
    yield from _trained(direct, (0, 1, 2), lr=3e-2)


def _cpu_long() -> Iterator[Job]:
    yield from _cpu()
    for n in (100, 500):
        yield from _trained((*_OURS, *_PEERS), (0, 1, 2), n=n)
    yield from (Job("in-context", n=4, seed=seed) for seed in (1, 2))
    yield from (Job("prefix-direct-random"), Job("embedding-only"))


def _gpu() -> Iterator[Job]:
    common: dict[str, Any] = {"batch_size": 8, "num_test": None, "max_new_tokens": 96}
    seeds = (0, 1, 2)
    for dataset, steps in (("e2e", 3000), ("webnlg", 10000)):
        fields = common | {"dataset": dataset}
        yield Job("zero-shot", n=0, **fields)
        yield from (Job("in-context", n=4, seed=seed, **fields) for seed in seeds)
        methods = ("prefix-mlp-words", "prefix-direct-words", *_PEERS, "peft-loha")
        yield from _trained(methods, seeds, n=None, steps=steps, **fields)
    low = common | {"steps": 500}
    for n in (50, 100, 200, 500):
        yield from _trained(("prefix-mlp-words", "peft-lora", "fine-tuning"), seeds, n=n, **low)
        yield from _trained(("prefix-mlp-text", "prefix-mlp-random"), seeds, n=n, **low)
    ablation = common | {"n": None, "steps": 3000}
    for length in (1, 2, 5, 20, 40, 80):
        yield from _trained(("prefix-mlp-words",), seeds, length=length, **ablation)
    others = ("embedding-only", "infix-mlp-words", "prefix-mlp-random", "prefix-direct-random")
    yield from _trained(others, seeds, **ablation)


def _unique(jobs: Iterator[Job]) -> tuple[Job, ...]:
    return tuple(dict.fromkeys(jobs))


SIZES = {
    "smoke": Size("every method for two steps: does it all run?", _unique(_smoke())),
    "tune": Size(
        "learning rates of the main methods, by the loss on dev: 7 minutes on two quiet cores",
        _unique(_tune()),
    ),
    "cpu": Size(
        "a low-data comparison, three seeds of its core: 90 minutes on two quiet cores",
        _unique(_cpu()),
    ),
    "cpu-long": Size(
        "as cpu, more methods with three seeds: three hours on two quiet cores",
        _unique(_cpu_long()),
    ),
    "gpu": Size("all of E2E and WebNLG, the paper's ablations", _unique(_gpu())),
}


def chosen_lr(job: Job, results: list[dict[str, Any]]) -> float:
    """The job's own, or of those tried with its method the one with the least loss on dev."""
    if job.lr is not None:
        return job.lr
    tried = [
        result
        for result in results
        if result["job"]["method"] == job.method and result["job"]["num_test"] == 0
    ]
    if not tried:
        return LEARNING_RATES[job.method][0]
    return float(min(tried, key=lambda result: result["dev_loss"])["lr"])
