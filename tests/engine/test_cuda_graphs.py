"""The runner of CUDA graphs, without capturing any: fixed buffers, padding, and who is replayed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from prefixd_server.attention import LayerOptions, StepPlan, create_backend, interface
from prefixd_server.attention.interface import PlanNotPassed, carry_plan_on_mask
from prefixd_server.engine.cuda_graphs import CudaGraphRunner, DecodeStep, bucket_sizes
from tests.engine.test_runner import CPU, Loop, Models, one_thread
from tests.support.families import FAMILIES, VOCAB

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [(1, [1]), (3, [4, 2, 1]), (128, [128, 64, 32, 16, 8, 4, 2, 1]), (1000, [256])],
)
def test_buckets_are_powers_of_two_up_to_a_full_batch(max_num_seqs: int, sizes: list[int]) -> None:
    assert bucket_sizes(max_num_seqs)[: len(sizes)] == sizes


class Replay(CudaGraphRunner):
    """Runs each fixed step anew where a graph would be replayed, and counts the rows."""

    def __init__(self, loop: Loop, max_num_seqs: int) -> None:
        backend = create_backend("triton", loop.pool)
        super().__init__(loop.models.served, backend, CPU, max_num_seqs=max_num_seqs)
        self.make_steps(bucket_sizes(max_num_seqs))
        self.rows: list[int] = []
        self._hook = self.module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if "logits_to_keep" not in kwargs:
            self.rows.append(kwargs["input_ids"].shape[1])

    def close(self) -> None:
        self._hook.remove()


@pytest.fixture(scope="module")
def models() -> Models:
    return Models("llama")


@pytest.fixture
def loop(models: Models) -> Iterator[Loop]:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip(
            "kernels of a CUDA device do not run on CPU tensors; e2e/test_cuda.py does this"
        )
    made = Loop(models)
    made.runner = Replay(made, max_num_seqs=4)
    yield made
    made.runner.close()


def test_padded_decodes_give_the_dense_models_logits(loop: Loop) -> None:
    moved = loop.add_prefix("moved", 7, query_offset=7)
    unmoved = loop.add_prefix("unmoved", 9, query_offset=0)
    for i, prefix in enumerate([None, moved, unmoved]):
        loop.add([3 + i, 4, 5], 4 + i, prefix)
    loop.run_all()
    for answer in loop.answers:
        loop.check(answer)
    assert isinstance(loop.runner, Replay)
    assert set(loop.runner.rows) == {4, 2, 1}


def test_a_step_with_a_prompt_runs_as_without_graphs(loop: Loop) -> None:
    loop.add([5, 6, 7], 3)
    loop.run_step()
    loop.add([9, 8], 2)
    assert isinstance(loop.runner, Replay)
    assert loop.runner.rows == []
    loop.run_step()
    assert loop.runner.rows == [], "a decode beside a prompt"
    loop.run_all()
    assert loop.runner.rows == [2]
    for answer in loop.answers:
        loop.check(answer)


class Cuda:
    """In the place of torch.cuda: which stream is current, and a capture that fails as torch's
    does, in its end and without leaving the stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails_at: int) -> None:
        self.current: object = "engine"
        self.num_streams = 0
        self.num_graphs = 0
        self.fails_at = fails_at
        cuda = self

        class Stream:
            def __init__(self) -> None:
                cuda.num_streams += 1

            def wait_stream(self, other: object) -> None:
                pass

        class Graph:
            def replay(self) -> None:
                raise AssertionError("captured on the CPU")

        @contextmanager
        def stream(chosen: object) -> Iterator[None]:
            before, self.current = self.current, chosen
            yield
            self.current = before

        @contextmanager
        def graph(graph: Graph, stream: object, **kwargs: object) -> Iterator[None]:
            before, self.current = self.current, stream
            yield
            if self.num_graphs == self.fails_at:
                raise RuntimeError("CUDA error: operation failed due to a previous error\n")
            self.num_graphs += 1
            self.current = before

        def set_stream(chosen: object) -> None:
            self.current = chosen

        class Current(Stream):
            def __init__(self) -> None:
                self.stream = cuda.current

        monkeypatch.setattr(DecodeStep, "_compute", lambda step: torch.zeros(4, VOCAB))
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "current_stream", Current)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda current: set_stream(current.stream))


@pytest.mark.parametrize("fails_at", [0, 3, 99])
def test_a_capture_that_fails_keeps_the_graphs_before_it_and_the_stream(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails_at: int
) -> None:
    cuda = Cuda(monkeypatch, fails_at=fails_at)
    assert isinstance(loop.runner, Replay)
    with caplog.at_level("INFO"):
        loop.runner.capture()
    all_of_them = [(4, False), (4, True), (2, False), (2, True), (1, False)]
    assert list(loop.runner.steps) == all_of_them[:fails_at]
    assert cuda.current == "engine"
    assert cuda.num_streams == 1
    (record,) = caplog.records
    assert ("without CUDA graphs but for" in record.message) == (fails_at < 5)
    if fails_at == 0:
        loop.add([5, 6, 7], 2)
        loop.run_all()
        loop.check(loop.answers[0])


def test_a_capture_that_breaks_the_device_is_no_start(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cuda(monkeypatch, fails_at=1)

    def check() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(loop.runner, "check", check)
    assert isinstance(loop.runner, Replay)
    with pytest.raises(RuntimeError, match="illegal"):
        loop.runner.capture()


class NoPlan(StepPlan):
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions
    ) -> Tensor:
        return torch.empty(*query.shape[:2], value.shape[2], device="meta", dtype=query.dtype)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_familys_decode_never_looks_at_its_values(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device there are none: what would make the host wait for the device raises."""
    if name == "GPT-2":
        # It looks for padding, though not while a graph is captured.
        monkeypatch.setattr(
            "transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True
        )
    interface.register()
    family = FAMILIES[name]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB}
    config = CONFIG_MAPPING[family.model_type](**special, **family.options)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    module.set_attn_implementation(interface.IMPLEMENTATION)
    inputs = {
        "input_ids": torch.zeros(1, 4, dtype=torch.int64, device="meta"),
        "position_ids": torch.zeros(1, 4, dtype=torch.int64, device="meta"),
        "use_cache": False,
        "attention_plan": NoPlan(),
    }
    try:
        output = module(**inputs)
    except PlanNotPassed:
        carry_plan_on_mask(module)
        output = module(**inputs)
    assert output.logits.shape == (1, 4, VOCAB)
