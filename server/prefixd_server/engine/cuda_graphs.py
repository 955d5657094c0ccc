"""Decode steps replayed from CUDA graphs: one launch instead of some hundred a layer stack.

A small model's decode step takes the device less time than Python takes to launch its kernels. A
graph is captured once for each of a few batch sizes and replayed with the step's tokens, positions
and page lists in buffers that stay where they are; rows beyond the step's sequences store nothing
and see nothing. Steps with a prompt chunk, with log-probabilities of prompts or with KV to capture
run as they would without graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor, nn

from prefixd_server.attention import AttentionBackend, DecodePlan, SequenceSpan
from prefixd_server.attention.work import grouping_pays
from prefixd_server.engine.runner import ModelRunner, pack, span_of
from prefixd_server.engine.scheduler import Scheduled
from prefixd_server.kv.transfer import stage

__all__ = ["CudaGraphRunner", "DecodeStep", "bucket_sizes"]

log = logging.getLogger(__name__)

_LARGEST_BUCKET = 256


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Powers of two up to the first that holds a full batch, descending."""
    sizes = [1]
    while sizes[-1] < min(max_num_seqs, _LARGEST_BUCKET):
        sizes.append(2 * sizes[-1])
    return sizes[::-1]


class DecodeStep:
    """One query for each of up to ``rows`` sequences, its inputs and outputs in fixed places."""

    def __init__(
        self, module: nn.Module, plan: DecodePlan, rows: int, device: torch.device
    ) -> None:
        self._module = module
        self._plan = plan
        self._inputs = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor | None = None

    def fits(self, spans: Seq[SequenceSpan]) -> bool:
        return self._plan.fits(spans)

    def run(self, step: Seq[Scheduled], spans: Seq[SequenceSpan]) -> Tensor:
        """Logits [rows, V], of which the first ``len(step)`` mean something, until the next run."""
        inputs = torch.zeros(self._inputs.shape, dtype=torch.int64)
        inputs[:, : len(step)] = torch.tensor(pack(step))
        self._inputs.copy_(stage(inputs, self._inputs.device), non_blocking=True)
        self._plan.fill(spans)
        if self._graph is None:
            return self._compute()
        assert self._output is not None
        self._graph.replay()
        return self._output

    def capture(self, memory: Any, stream: torch.cuda.Stream) -> None:
        """``memory``: a ``graph_pool_handle``. ``stream``: one for all graphs, since each that a
        matrix product ran on keeps a workspace of 8 MiB and more.

        Raises what the module does if it cannot be captured, maybe on ``stream`` still.
        """
        self._plan.fill(())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compiles kernels and lets libraries allocate, neither of which a capture may do.
            self._compute()
            self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Loader threads may copy a prefix meanwhile.
        with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
            self._output = self._compute()
        self._graph = graph

    def _compute(self) -> Tensor:
        output = self._module(
            input_ids=self._inputs[:1],
            position_ids=self._inputs[1:],
            use_cache=False,
            attention_plan=self._plan,
        )
        logits: Tensor = output.logits[0]
        return logits


class CudaGraphRunner(ModelRunner):
    """A runner that replays what it can; ``capture`` before the first step."""

    def __init__(
        self,
        module: nn.Module,
        backend: AttentionBackend,
        device: torch.device,
        *,
        max_num_seqs: int,
    ) -> None:
        super().__init__(module, backend, device)
        self._max_num_seqs = max_num_seqs
        self.steps: dict[tuple[int, bool], DecodeStep] = {}
        """by rows, and whether prefixes are read by groups"""

    @torch.inference_mode()
    def capture(self, sizes: Seq[int] | None = None) -> None:
        """``sizes``: of batches, powers of two, descending; default: all that can come.

        Largest first, since smaller ones fit into the memory that they leave. After one that fails,
        ``steps`` holds those before it, and what else comes is run as without graphs. Raises only
        where the device is broken.
        """
        self.make_steps(sizes or bucket_sizes(self._max_num_seqs))
        memory, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        before = torch.cuda.current_stream()
        captured: dict[tuple[int, bool], DecodeStep] = {}
        try:
            for key, step in self.steps.items():
                step.capture(memory, stream)
                captured[key] = step
        except Exception as error:
            # Where it fails to end a capture, torch does not leave the stream either.
            torch.cuda.set_stream(before)
            self.check()
            # A family may look at its values, or run experts by what they are.
            reason = " ".join(str(error).split())[:200]
            log.warning(
                "decode runs without CUDA graphs but for %d of %d: %s: %s",
                len(captured),
                len(self.steps),
                type(error).__name__,
                reason,
            )
        else:
            log.info("captured %d CUDA graphs", len(captured))
        self.steps = captured

    def make_steps(self, sizes: Seq[int]) -> None:
        for rows in sizes:
            for grouped in (False, True)[: 1 + (rows > 1)]:
                plan = self.backend.decode_plan(rows, grouped=grouped)
                if plan is not None:
                    step = DecodeStep(self.module, plan, rows, self.device)
                    self.steps[rows, grouped] = step

    def replays(self, step: Seq[Scheduled]) -> bool:
        """Whether a step of decodes is one that ``steps`` has a place for."""
        return self._step_for([span_of(item) for item in step]) is not None

    def _logits(self, step: Seq[Scheduled], keep: list[int]) -> Tensor:
        # All rows are sampled from, so `keep` is each sequence's one token.
        if all(count == 1 for _, count in step) and len(keep) == len(step):
            spans = [span_of(item) for item in step]
            decode = self._step_for(spans)
            if decode is not None:
                return decode.run(step, spans)[: len(step)]
        return super()._logits(step, keep)

    def _step_for(self, spans: Seq[SequenceSpan]) -> DecodeStep | None:
        rows = 1 << (len(spans) - 1).bit_length()
        found = self.steps.get((rows, rows > 1 and grouping_pays(spans)))
        return found if found is not None and found.fits(spans) else None
