"""The compiled kernels of one instruction set, whatever the process itself uses."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

from prefixd_server.native.build import default_folder, library
from prefixd_server.native.kernels import Kernels

__all__ = ["ISAS", "kernels_of"]

ISAS = ("avx512", "avx2", "generic")


def kernels_of(isa: str, folder: Path) -> Kernels:
    """Of a copy of the library in ``folder``, which chooses anew; skips where the CPU lacks it."""
    with patch.dict(os.environ, PREFIXD_NATIVE_ISA=isa):
        copy = shutil.copy(library(default_folder()), folder / f"{isa}.so")
        loaded = Kernels(ctypes.CDLL(copy))
    if loaded.gemm.isa != isa:
        pytest.skip(f"this CPU has no {isa}")
    return loaded
