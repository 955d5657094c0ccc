"""One physical copy of a prefix per version, however many requests attend to it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

import pytest

from prefixd_server.config import ModelConfig
from prefixd_server.kv.allocator import pages_for
from prefixd_server.models.loader import LoadedModel, load_model
from prefixd_server.types import PrefixState
from tests.support.engine import EngineRun, request
from tests.support.models import Reference, load_base, save_peft_prefix, tiny_model_folder

NUM_REQUESTS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(ModelConfig(model=str(folder)))


@pytest.mark.parametrize(
    ("num_virtual_tokens", "attention"),
    [(1, "auto"), (7, "auto"), (33, "auto"), (33, "sdpa"), (2047, "auto"), (2048, "auto")],
)
def test_many_requests_share_one_copy(
    folder: Path,
    model: LoadedModel,
    tmp_path: Path,
    num_virtual_tokens: int,
    attention: Literal["auto", "sdpa"],
) -> None:
    prefix = save_peft_prefix(
        load_base(folder), tmp_path / "p", num_virtual_tokens=num_virtual_tokens, seed=1
    )
    rng = random.Random(0)
    prompts = [[rng.randrange(10, 40_000) for _ in range(1 + i % 40)] for i in range(NUM_REQUESTS)]
    with EngineRun(
        model, tmp_path / "store", max_num_batched_tokens=4096, attention=attention
    ) as run:
        run.publish("cartridge", prefix, tmp_path)
        run.submit(
            request(f"r{i}", "cartridge", prompt, max_new_tokens=8)
            for i, prompt in enumerate(prompts)
        )
        while run.engine.num_running < NUM_REQUESTS:
            run.step()
        size = run.allocator.page_size
        shared = pages_for(num_virtual_tokens, size)
        own = sum(len(sequence.pages) for sequence in run.engine.scheduler.running)
        assert run.allocator.num_used == shared + own
        # A page more than the prompt needs, at most, for the tokens generated so far.
        assert own <= sum(pages_for(len(prompt), size) + 1 for prompt in prompts)
        run.run()
        assert run.allocator.num_used == shared
        reference = Reference(folder)
        for i in (0, 17, 63):
            assert run.results[f"r{i}"].ids == reference.generate(prefix, prompts[i], 8)[0]


def test_an_evicted_prefix_is_loaded_again(
    folder: Path, model: LoadedModel, tmp_path: Path
) -> None:
    """Three prefixes that do not fit together take turns; each is right each time."""
    base = load_base(folder)
    prefixes = {
        f"t{i}": save_peft_prefix(base, tmp_path / f"p{i}", num_virtual_tokens=100, seed=i)
        for i in range(3)
    }
    reference = Reference(folder)
    expected = {task: reference.generate(prefix, [7, 8], 4)[0] for task, prefix in prefixes.items()}
    with EngineRun(model, tmp_path / "store", num_pages=17) as run:
        for task, prefix in prefixes.items():
            run.publish(task, prefix, tmp_path)
        for turn in range(3):
            run.submit(
                request(f"{task}-{turn}", task, [7, 8], max_new_tokens=4) for task in prefixes
            )
            run.run()
        for task in prefixes:
            for turn in range(3):
                assert run.results[f"{task}-{turn}"].ids == expected[task]
        states = [
            run.server.residency.state(run.server.registry.resolve("default", task, None, 0.0).key)
            for task in prefixes
        ]
        assert states.count(PrefixState.DEVICE) < 3
