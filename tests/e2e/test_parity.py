"""Tokens and log-probabilities equal PEFT's on the same weights, alone, mixed, chunked, preempted.

The oracle is ``PeftModel.generate`` with a batch of one. Prefixes are saved by PEFT itself.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prefixd_server.config import ModelConfig
from prefixd_server.models.loader import LoadedModel, load_model
from prefixd_server.types import FinishReason
from tests.support.engine import EngineRun, request
from tests.support.models import (
    Reference,
    demo_folder,
    load_base,
    save_peft_prefix,
    tiny_model_folder,
)

LENGTHS = (1, 7, 20, 33, 512)
NUM_TASKS = 16
NUM_REQUESTS = 64
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    request_id: str
    task: str | None
    prompt: list[int]
    max_new_tokens: int
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class World:
    """One model, 16 prefixes of PEFT's, and 64 requests with what PEFT answers to them."""

    model: LoadedModel
    prefixes: dict[str, Path]
    cases: list[Case]


@pytest.fixture(scope="module", params=["llama", "gpt2", "demo"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    family = request.param
    root = tmp_path_factory.mktemp(family)
    folder = demo_folder() if family == "demo" else tiny_model_folder(family, root / "model")
    base = load_base(folder)
    prefixes = {
        f"task{i}": save_peft_prefix(
            base,
            root / f"prefix{i}",
            num_virtual_tokens=LENGTHS[i % len(LENGTHS)],
            seed=i,
            cartridge=i % 4 == 3 and LENGTHS[i % len(LENGTHS)] > 1,
        )
        for i in range(NUM_TASKS)
    }
    reference = Reference(folder)
    # The real model is a hundred times slower on a CPU.
    longest = 12 if family == "demo" else 40
    rng = random.Random(family)
    cases = []
    for i in range(NUM_REQUESTS):
        task = None if i % 17 == 16 else f"task{i % NUM_TASKS}"
        prompt = [rng.randrange(10, 40_000) for _ in range(rng.choice([1, 2, 5, 16, 17, 60]))]
        count = rng.randint(1, longest)
        prefix = prefixes[task] if task else None
        tokens, logprobs = reference.generate(prefix, prompt, count)
        cases.append(Case(f"r{i}", task, prompt, count, tokens, logprobs))
    return World(load_model(ModelConfig(model=str(folder))), prefixes, cases)


def start(world: World, tmp_path: Path, **options: Any) -> EngineRun:
    run = EngineRun(world.model, tmp_path / "store", **options)
    for task, checkpoint in world.prefixes.items():
        run.publish(task, checkpoint, tmp_path)
    return run


def submit(run: EngineRun, case: Case, suffix: str = "") -> None:
    run.submit(
        [
            request(
                case.request_id + suffix,
                case.task,
                case.prompt,
                max_new_tokens=case.max_new_tokens,
            )
        ]
    )


def check(run: EngineRun, case: Case, suffix: str = "") -> None:
    result = run.results[case.request_id + suffix]
    assert result.finish.reason in (FinishReason.LENGTH, FinishReason.EOS), result.finish
    assert result.ids == case.tokens, case
    got = [token.logprob for token in result.tokens]
    assert got == pytest.approx(case.logprobs, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="mixed"),
        pytest.param({"max_num_batched_tokens": 24, "page_size": 4}, id="chunked"),
        pytest.param({"attention": "sdpa"}, id="sdpa"),
    ],
)
def test_mixed_requests_get_pefts_tokens(
    world: World, tmp_path: Path, options: dict[str, Any]
) -> None:
    """64 requests of 16 tasks and the base model, arriving while others run."""
    rng = random.Random(1)
    waiting = list(world.cases)
    with start(world, tmp_path, **options) as run:
        while waiting:
            for _ in range(rng.randint(0, 8)):
                if waiting:
                    submit(run, waiting.pop())
            run.step()
        run.run()
        for case in world.cases:
            check(run, case)


@pytest.mark.slow
def test_preempted_requests_get_the_same_tokens(world: World, tmp_path: Path) -> None:
    """A pool with room for little more than one long prefix: sequences are thrown out, redone."""
    cases = [case for case in world.cases if case.task and len(case.prompt) < 60][:24]
    with start(world, tmp_path, num_pages=140, page_size=4, max_num_seqs=16) as run:
        for case in cases:
            submit(run, case)
        run.run()
        for case in cases:
            check(run, case)
        assert run.engine.scheduler.num_preemptions > 0 or world.model.name != "gpt2"


def test_alone_equals_mixed(world: World, tmp_path: Path) -> None:
    with start(world, tmp_path) as run:
        for case in world.cases[:: NUM_REQUESTS // 8]:
            submit(run, case)
            run.run()
            check(run, case)


def test_prompt_logprobs_are_the_models(world: World, tmp_path: Path) -> None:
    """Teacher-forced: the log-probabilities of a prompt are those of generating it."""
    case = next(case for case in world.cases if case.task == "task3" and len(case.tokens) > 1)
    prompt = [*case.prompt, *case.tokens]
    with start(world, tmp_path, max_num_batched_tokens=5) as run:
        run.submit(
            [request("r", case.task, prompt, max_new_tokens=1, prompt_logprobs=True)],
        )
        run.run()
        started = run.results["r"].started
        assert started is not None
        assert len(started.prompt_logprobs) == len(prompt) - 1
        generated = started.prompt_logprobs[len(case.prompt) - 1 :]
        assert list(generated) == pytest.approx(case.logprobs, abs=TOLERANCE)
