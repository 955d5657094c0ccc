"""Steps of a decoder-only model as one call of C++ each; the modules do what it cannot."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor, nn

from prefixd_server.attention.native import NativeBackend
from prefixd_server.engine.runner import ModelRunner, pack, span_of
from prefixd_server.engine.scheduler import Scheduled
from prefixd_server.native.program import Program

__all__ = ["ProgramRunner"]


class ProgramRunner(ModelRunner):
    def __init__(
        self, module: nn.Module, program: Program, backend: NativeBackend, device: torch.device
    ) -> None:
        super().__init__(module, backend, device)
        self._program = program
        self._native = backend

    def _logits(self, step: Seq[Scheduled], keep: list[int]) -> Tensor:
        tokens, positions = pack(step)
        plan = self._native.plan([span_of(item) for item in step])
        pool = self._native.pool
        return self._program.run(
            tokens,
            positions,
            keep,
            keys=pool.keys,
            values=pool.values,
            slots=plan.slots,
            parts=plan.parts,
        )
