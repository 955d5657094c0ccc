"""Programs compute what the model's own modules compute, for every family that is served."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prefixd_server.attention.base import SequenceSpan
from prefixd_server.attention.native import NativeBackend
from prefixd_server.config import ModelConfig
from prefixd_server.kv.pool import KVPool
from prefixd_server.models import record as recording
from prefixd_server.models.loader import LoadedModel, load_model
from prefixd_server.models.translate import CannotTranslate, translate
from prefixd_server.native import kernels
from prefixd_server.native.program import Kind
from tests.support.families import FAMILIES, VOCAB
from tests.support.models import tiny_model_folder
from tests.support.threads import one_thread

__all__ = ["one_thread"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(kernels.load() is None, reason="there is no C++ compiler"),
]

OWN_MODULES = {
    "GPT-NeoX": "to_copy",  # a part of each head is turned
    "OPT": "different shapes",
    "GPT-BigCode, multi-head": "beside each other",
    "Mixtral": "in place",
    "Qwen3-MoE": "in place",
    "Phi": "beside each other",
    "Phi-3, long RoPE": "in place",
    "StableLM": "beside each other",
    "Cohere": "to_copy",
    "Cohere 2": "to_copy",
    "GLM-4": "to_copy",
    "Nemotron": "to_copy",
}
"""Families that no program can be made of, and a part of the reason."""

PAGE = 4


def load(title: str, folder: Path) -> LoadedModel:
    return load_model(ModelConfig(model=str(FAMILIES[title].save(folder))))


def backend_of(model: LoadedModel, num_pages: int = 64) -> NativeBackend:
    geometry = model.geometry
    return NativeBackend(
        KVPool(
            num_layers=geometry.num_layers,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            num_pages=num_pages,
            page_size=PAGE,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
    )


Step = tuple[list[int], list[int], list[int], list[SequenceSpan]]


def steps(vocab: int) -> list[Step]:
    """A mixed batch over three steps: prefills, one in chunks; then a decode of each; one alone.

    Two sequences share a prefix of 6 tokens, whose pages the first step fills as a sequence.
    """
    random = torch.Generator().manual_seed(3)

    def tokens(n: int) -> list[int]:
        return torch.randint(1, vocab, (n,), generator=random).tolist()

    prefix = {"prefix_pages": [0, 1], "prefix_len": 6}
    a, b, c = [2, 3, 4, 5, 6, 7], [8, 9, 10], [11, 12]
    return [
        (tokens(6), [*range(6)], [5], [SequenceSpan(6, 0, [0, 1])]),
        (
            tokens(20 + 3 + 4),
            [*range(6, 26), *range(6, 9), *range(4)],
            [26, 19],
            [
                SequenceSpan(20, 0, a, **prefix),
                SequenceSpan(3, 0, b, **prefix),
                SequenceSpan(4, 0, c),
            ],
        ),
        (
            tokens(1 + 5 + 1),
            [26, *range(9, 14), 4],
            [0, 5, 6],
            [
                SequenceSpan(1, 20, a, **prefix),
                SequenceSpan(5, 3, b, **prefix),
                SequenceSpan(1, 4, c),
            ],
        ),
        (tokens(1), [5], [0], [SequenceSpan(1, 5, c)]),
    ]


def both(model: LoadedModel, backend: NativeBackend, step: Step) -> tuple[Tensor, Tensor]:
    """Logits of the program and of the modules; the pages are written twice with the same."""
    tokens, positions, keep, spans = step
    assert model.program is not None
    plan = backend.plan(spans)
    program = model.program.run(
        tokens,
        positions,
        keep,
        keys=backend.pool.keys,
        values=backend.pool.values,
        slots=plan.slots,
        parts=plan.parts,
    )
    with torch.inference_mode():
        modules = model.module(
            input_ids=torch.tensor(tokens)[None],
            position_ids=torch.tensor(positions)[None],
            use_cache=False,
            logits_to_keep=torch.tensor(keep),
            attention_plan=backend.plan(spans),
        ).logits[0]
    return program, modules


@pytest.mark.parametrize("title", [title for title in FAMILIES if title not in OWN_MODULES])
def test_every_family(title: str, tmp_path: Path) -> None:
    model = load(title, tmp_path)
    assert model.program is not None
    backend = backend_of(model)
    for step in steps(VOCAB):
        program, modules = both(model, backend, step)
        torch.testing.assert_close(program, modules, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("title", OWN_MODULES)
def test_families_that_stay_with_their_modules(
    title: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "prefixd_server.models.record"):
        model = load(title, tmp_path)
    assert model.program is None
    [line] = [r.getMessage() for r in caplog.records if r.name == recording.__name__]
    assert "runs by its own modules" in line
    assert OWN_MODULES[title] in line


def test_threads_do_not_change_a_result(tmp_path: Path) -> None:
    model = load("Llama", tmp_path)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        backend = backend_of(model)
        results.append([both(model, backend, step)[0] for step in steps(VOCAB)])
    torch.set_num_threads(1)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_threads_that_lose_their_cores(tmp_path: Path) -> None:
    """More threads than cores, beside processes that want them too: the same to the bit."""
    model = load("Llama", tmp_path)
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    torch.set_num_threads(5)
    try:
        results = []
        for _ in range(20):
            backend = backend_of(model)
            results.append(torch.cat([both(model, backend, step)[0] for step in steps(VOCAB)]))
    finally:
        torch.set_num_threads(1)
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert all(torch.equal(result, results[0]) for result in results)


def test_one_request_does_not_reach_another(tmp_path: Path) -> None:
    """NaN in one sequence's cache stays in its rows."""
    model = load("Llama", tmp_path)
    backend = backend_of(model)
    for step in steps(VOCAB)[:2]:
        both(model, backend, step)
    good, _ = both(model, backend, steps(VOCAB)[2])
    for layer in backend.pool.keys:
        layer[11 * PAGE] = torch.nan  # the last sequence's first token
    bad, _ = both(model, backend, steps(VOCAB)[2])
    assert torch.equal(bad[:2], good[:2])
    assert bad[2].isnan().all()


def test_angles_of_positions_beyond_the_first_table(tmp_path: Path) -> None:
    model = load("Llama", tmp_path)
    backend = backend_of(model)
    for position in (3, 300, 511, 4):
        step = ([5], [position], [0], [SequenceSpan(1, 0, [0])])
        program, modules = both(model, backend, step)
        torch.testing.assert_close(program, modules, rtol=1e-4, atol=1e-4)


def test_a_program_that_is_wrong_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def careless(*args: Any, **kwargs: Any) -> Any:
        operations = translate(*args, **kwargs)
        last = max(i for i, op in enumerate(operations) if op.kind is Kind.ACTIVATE)
        operations[last] = replace(operations[last], numbers=(1.1, 0.0))
        return operations

    monkeypatch.setattr(recording, "translate", careless)
    with caplog.at_level(logging.INFO, "prefixd_server.models.record"):
        model = load("Qwen2", tmp_path)
    assert model.program is None
    assert "other logits" in caplog.text


ROW, STEP = torch.ones(32), torch.ones(1, 13, 32)
BACKWARDS = torch.arange(12, -1, -1)


class _Modules(nn.Module):
    """What a model of a few operators does with tokens; not what any model does."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32).requires_grad_(False)
        self.change = change

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor, **_: Any) -> Any:
        hidden = self.change(self.table(input_ids))
        return type("Output", (), {"logits": hidden[:, logits_to_keep, :] * 2.0})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.sin(), "sin"),
        (lambda x: x + ROW, "different shapes"),
        (lambda x: x + STEP, "neither tokens nor layers"),
        (lambda x: x.add_(1.0), "in place"),
        (lambda x: (x + x).flip(1), "flip"),
        (lambda x: (x + x).double().float(), "copy"),
        (lambda x: torch.cat([x, x], 1)[:, ::2], "cat"),
        (lambda x: (x + x)[:, BACKWARDS], "index"),
    ],
)
def test_what_is_not_known_is_said(change: Any, reason: str) -> None:
    loaded = kernels.load()
    assert loaded is not None
    recorder = recording._Recorder()
    logits = recorder.watch(_Modules(change), loaded)
    with pytest.raises(CannotTranslate, match=reason):
        translate(recorder.nodes, recorder.inputs, logits, tokens=13)


def test_sums_and_products_are_fused(tmp_path: Path) -> None:
    model = load_model(ModelConfig(model=str(tiny_model_folder("llama", tmp_path))))
    assert model.program is not None
    kinds = [op.kind for op in model.program.operations]
    assert Kind.ADD not in kinds
    assert Kind.MULTIPLY not in kinds
    # norm, QKV, two turns, attention, output; norm, gate and up, gating, down
    assert len(kinds) == 1 + 10 * model.geometry.num_layers + 3
