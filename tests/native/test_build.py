"""Compiling the kernels: once a machine, whoever is first; and serving where it cannot be done."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prefixd_server.attention.native import NativeBackend
from prefixd_server.attention.sdpa import SDPABackend
from prefixd_server.config import ModelConfig
from prefixd_server.models.loader import load_model
from prefixd_server.native import build, kernels
from prefixd_server.native.build import CannotBuild, default_folder, library
from tests.support.engine import EngineRun, request
from tests.support.families import FAMILIES
from tests.support.threads import one_thread

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

MACHINES = kernels.load() and library(default_folder())
needs_compiler = pytest.mark.skipif(MACHINES is None, reason="there is no C++ compiler")


@pytest.fixture
def compiler(tmp_path: Path) -> str:
    """It takes its time, then gives what the real one gave on this machine, which takes longer."""
    script = tmp_path / "c++"
    script.write_text(f"#!/bin/sh\nfor made; do :; done\nsleep 0.3\ncp {MACHINES} $made\n")
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for the library, and nothing remembered of this process's own."""
    monkeypatch.setenv("PREFIXD_NATIVE_DIR", str(tmp_path / "native"))
    monkeypatch.delenv("CXX", raising=False)
    _forget()
    yield default_folder()
    _forget()


def _forget() -> None:
    library.cache_clear()
    kernels.load.cache_clear()


def build_in_a_process(**environment: str) -> subprocess.Popen[str]:
    """As an image's build runs it."""
    return subprocess.Popen(
        [sys.executable, "-m", "prefixd_server.native.build"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def norm_works() -> bool:
    found = kernels.load()
    assert found is not None
    x = torch.randn(3, 40)
    wanted = torch.nn.functional.rms_norm(x, (40,), eps=1e-6)
    return torch.allclose(found.rms_norm(x, torch.ones(40), 0.0, 1e-6), wanted, atol=1e-6)


@needs_compiler
def test_two_processes_at_once_leave_one_whole_library(folder: Path, compiler: str) -> None:
    processes = [build_in_a_process(CXX=compiler) for _ in range(2)]
    printed = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    [path] = folder.iterdir()
    assert printed == {str(path)}
    assert path.read_bytes() == MACHINES.read_bytes()
    assert norm_works()


@needs_compiler
def test_a_library_that_is_there_needs_no_compiler(
    folder: Path, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image's case: compiled in one stage, run in another that is read-only."""
    monkeypatch.setenv("CXX", compiler)
    path = library(folder)
    library.cache_clear()
    monkeypatch.setenv("CXX", "/bin/false")
    folder.chmod(0o555)
    assert library(folder) == path
    assert norm_works()


DAMAGED = pytest.mark.parametrize(
    "content", [b"", b"not a library", b"\x7fELF" + bytes(60)], ids=len
)


@needs_compiler
@DAMAGED
def test_a_damaged_library_is_compiled_again(
    folder: Path,
    compiler: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
) -> None:
    monkeypatch.setenv("CXX", compiler)
    folder.mkdir()
    path = folder / f"kernels-{build._digest()}.so"
    path.write_bytes(content)
    assert norm_works()
    assert path.read_bytes() == MACHINES.read_bytes()
    assert [str(path) in r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        True
    ]


@DAMAGED
def test_a_damaged_library_without_a_compiler(
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    folder.mkdir()
    (folder / f"kernels-{build._digest()}.so").write_bytes(content)
    assert kernels.load() is None
    assert "serving with torch's own operators" in caplog.records[-1].getMessage()


@needs_compiler
def test_a_library_without_the_kernels_is_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir()
    source = tmp_path / "empty.cpp"
    source.write_text("")
    path = folder / f"kernels-{build._digest()}.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    assert kernels.load() is None
    [record] = caplog.records
    assert "undefined symbol" in record.getMessage()


@pytest.mark.parametrize("path", ["", "/nowhere"])
def test_no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("PATH", path)
    with pytest.raises(CannotBuild, match=r"no C\+\+ compiler \(g\+\+\)"):
        library(folder)


@pytest.mark.parametrize("command", ["/bin/false", "/no/such/compiler"])
def test_a_compiler_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("CXX", command)
    with pytest.raises(CannotBuild, match=command):
        library(folder)
    assert list(folder.iterdir()) == [], "something half made is left"


def test_what_the_compiler_says_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "cxx"
    script.write_text("#!/bin/sh\necho 'fatal error: omp.h: No such file' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(CannotBuild, match=r"omp\.h: No such file"):
        library(folder)


def test_a_folder_that_cannot_be_made(folder: Path) -> None:
    folder.write_text("a file")
    with pytest.raises(CannotBuild, match="native"):
        library(folder)


def test_the_command_without_a_compiler_says_why(folder: Path) -> None:
    process = build_in_a_process(CXX="/bin/false")
    printed, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert printed == ""
    assert "CannotBuild: /bin/false" in said


@needs_compiler
def test_the_server_answers_the_same_without_a_compiler(
    folder: Path,
    compiler: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = str(FAMILIES["Llama"].save(tmp_path / "model"))
    answers = {}
    for command, backend in ((compiler, NativeBackend), ("/bin/false", SDPABackend)):
        monkeypatch.setenv("CXX", command)
        monkeypatch.setenv("PREFIXD_NATIVE_DIR", str(tmp_path / backend.__name__))
        _forget()
        caplog.clear()
        loaded = load_model(ModelConfig(model=model, device="cpu"))
        with EngineRun(loaded, tmp_path / f"store-{backend.__name__}") as run:
            assert type(run.engine.runner.backend) is backend
            run.submit([request("r", None, [5, 6, 7], max_new_tokens=8)])
            run.run()
            answers[command] = run.results["r"].ids
    assert len(answers[compiler]) == 8
    assert answers["/bin/false"] == answers[compiler]
    [warning] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "no CPU kernels" in warning.getMessage()
    assert "/bin/false" in warning.getMessage()
