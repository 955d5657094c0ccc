"""For all tests: side by side in several processes, each keeps to one core."""

from __future__ import annotations

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    # xdist tells its workers of a terminal, whose width rich would keep from its import on.
    os.environ.pop("COLUMNS", None)
    os.environ.pop("LINES", None)

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, and its own when it is first imported, whoever does.
    os.environ.setdefault("TRITON_INTERPRET", "1")
