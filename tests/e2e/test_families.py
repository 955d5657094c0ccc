"""Every family of the table gets PEFT's tokens and log-probabilities in one mixed batch.

The oracle is ``PeftModel.generate`` with a batch of one; PEFT runs all of these families itself,
with the cache that it chooses for them. What it does where a prefix is longer than the window is
checked below: a prefix's token is hidden from those that stand a window or more after it, as any
token is, so of P tokens the first prompt token sees the last ``window - 1`` in such a layer.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from prefixd_server.config import ModelConfig
from prefixd_server.errors import UnsupportedModel
from prefixd_server.models.loader import load_model
from prefixd_server.native import kernels
from tests.e2e.families_table import DOCUMENT, models_page
from tests.support.engine import EngineRun, request
from tests.support.families import FAMILIES, ORIGINAL_POSITIONS, REFUSED, VOCAB, WINDOW, WINDOWED
from tests.support.models import Reference, load_base, save_peft_prefix
from tests.support.threads import one_thread

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = {"one": 1, "twenty": 20, "again": 20, "long": 130}
PROMPT_LENGTHS = (1, 5, 18, 70)
"""several windows of 16 are passed within a prompt, and by a prefix alone"""
MAX_NEW_TOKENS = 6
TOLERANCE = 1e-4
FASTEST = "SDPABackend" if kernels.load() is None else "NativeBackend"
"""on the CPU of this machine"""


def prompts(seed: int, *lengths: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("title", FAMILIES)
def test_tokens_and_logprobs_are_pefts(title: str, tmp_path: Path) -> None:
    """With the kernels and packed weights, and with torch's attention and the model's layers."""
    folder = FAMILIES[title].save(tmp_path / "model")
    base = load_base(folder)
    prefixes = {
        task: save_peft_prefix(base, tmp_path / task, num_virtual_tokens=length, seed=seed)
        for seed, (task, length) in enumerate(TASKS.items())
    }
    reference = Reference(folder)
    cases = {
        f"{task}-{len(prompt)}": (task, prompt)
        for seed, task in enumerate([*TASKS, None])
        for prompt in prompts(seed, *PROMPT_LENGTHS)
    }
    runs = []
    for attention, pack_weights in (("auto", True), ("sdpa", False)):
        model = load_model(ModelConfig(model=str(folder), pack_weights=pack_weights))
        # Longer than a step: prefills are cut up and share steps with decodes.
        with EngineRun(
            model, tmp_path / f"store-{attention}", max_num_batched_tokens=96, attention=attention
        ) as run:
            for task, checkpoint in prefixes.items():
                run.publish(task, checkpoint, tmp_path)
            run.submit(
                request(name, task, prompt, max_new_tokens=MAX_NEW_TOKENS)
                for name, (task, prompt) in cases.items()
            )
            run.run()
        runs.append(run)
    assert type(runs[0].engine.runner.backend).__name__ == FASTEST
    for name, (task, prompt) in cases.items():
        prefix = prefixes[task] if task else None
        tokens, logprobs = reference.generate(prefix, prompt, MAX_NEW_TOKENS)
        for run in runs:
            result = run.results[name]
            assert result.ids == tokens, name
            got = [token.logprob for token in result.tokens]
            assert got == pytest.approx(logprobs, abs=TOLERANCE), name


@pytest.mark.parametrize(
    "title", [title for title, family in FAMILIES.items() if family.notes == WINDOWED]
)
def test_a_prefix_ages_out_of_the_window_like_any_token(title: str, tmp_path: Path) -> None:
    """The first prompt token sees window - 1 of the prefix's rows; older ones change nothing."""
    folder = FAMILIES[title].save(tmp_path / "model")
    length = TASKS["long"]
    whole = save_peft_prefix(
        load_base(folder), tmp_path / "whole", num_virtual_tokens=length, seed=0
    )
    first_seen = length - (WINDOW - 1)
    older = change_rows(whole, tmp_path / "older", slice(0, first_seen))
    seen = change_rows(whole, tmp_path / "seen", slice(first_seen, first_seen + 1))
    [prompt] = prompts(0, 1)

    reference = Reference(folder)
    paths = (whole, older, seen)
    expected = [reference.generate(path, prompt, 1)[1][0] for path in paths]

    with EngineRun(load_model(ModelConfig(model=str(folder))), tmp_path / "store") as run:
        for path in paths:
            run.publish(path.name, path, tmp_path)
            run.submit([request(path.name, path.name, prompt, max_new_tokens=1)])
        run.run()
    got = [run.results[path.name].tokens[0].logprob for path in paths]
    assert got == pytest.approx(expected, abs=TOLERANCE)
    for logprobs in (expected, got):
        assert logprobs[1] == pytest.approx(logprobs[0], abs=1e-5)
        assert logprobs[2] != pytest.approx(logprobs[0], abs=1e-2)


def change_rows(checkpoint: Path, folder: Path, rows: slice) -> Path:
    shutil.copytree(checkpoint, folder)
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    tensors["prompt_embeddings"][rows] += 1.0
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_rope_that_depends_on_the_batch_is_served_up_to_where_it_does(tmp_path: Path) -> None:
    folder = FAMILIES["Phi-3, long RoPE"].save(tmp_path)
    assert load_model(ModelConfig(model=str(folder))).max_model_len == ORIGINAL_POSITIONS
    with pytest.raises(UnsupportedModel, match=f"beyond {ORIGINAL_POSITIONS} positions"):
        load_model(ModelConfig(model=str(folder), max_model_len=ORIGINAL_POSITIONS + 1))


@pytest.mark.parametrize("title", REFUSED)
def test_what_cannot_be_served_is_refused_by_name(title: str, tmp_path: Path) -> None:
    folder = REFUSED[title].save(tmp_path / "model")
    architecture = type(load_base(folder)).__name__
    with pytest.raises(UnsupportedModel) as refused:
        load_model(ModelConfig(model=str(folder)))
    assert architecture in str(refused.value)
    assert REFUSED[title].notes in str(refused.value)


def test_the_table_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == models_page()
