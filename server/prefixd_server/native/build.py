"""Compiles the C++ of this folder where there is a compiler, once a machine: ``python -m
prefixd_server.native.build``.

The library is kept in a folder by the hash of its sources and flags, and is portable between CPUs
of one architecture (it has its loops for each instruction set), so an image can bring it along.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["CannotBuild", "default_folder", "library"]

log = logging.getLogger(__name__)

_SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno"]
_FLAGS += ["-fno-trapping-math", "-Wno-psabi"]
_FLAGS += ["-falign-loops=64"]
"""for the tile's: across one more line of code it takes up to a quarter longer on Zen 3"""
_TIMEOUT_S = 300


class CannotBuild(Exception):
    """There is no compiler, or it failed; says why in a line."""


def default_folder() -> Path:
    """``$PREFIXD_NATIVE_DIR``, else beside the converted models."""
    return Path(os.environ.get("PREFIXD_NATIVE_DIR", "~/.cache/prefixd/native")).expanduser()


@cache
def library(folder: Path) -> Path:
    """The shared library in ``folder``, compiled if it is not there. Raises CannotBuild."""
    path = folder / f"kernels-{_digest()}.so"
    if not path.exists():
        _compile(path)
    return path


def _digest() -> str:
    parts = [path.read_bytes() for path in _SOURCES + _HEADERS]
    parts += [" ".join(_FLAGS).encode(), platform.machine().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise CannotBuild("there is no C++ compiler (g++)")
    log.info("compiling the CPU kernels, once on this machine")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder, path.name)
            command = [compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
            # Two servers may start at once: each renames a whole file into place.
            made.replace(path)
    except subprocess.CalledProcessError as error:
        raise CannotBuild(f"{compiler}: {' '.join(error.stderr.split())[:300]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{compiler}: {error}") from error


if __name__ == "__main__":
    print(library(default_folder()))
