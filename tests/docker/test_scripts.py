"""The smoke script: its syntax, and its plain words where it cannot run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docker.files import DOCKER, example_settings
from tests.docker.source import routes

SMOKE = DOCKER / "smoke.sh"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_it_is_executable() -> None:
    assert os.access(SMOKE, os.X_OK)


@pytest.mark.parametrize("shell", ["sh", "bash", "dash"])
def test_shells_parse_it(shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    answer = run(shell, "-n", str(SMOKE))
    assert (answer.returncode, answer.stderr) == (0, "")


def test_shellcheck_finds_nothing() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    answer = run("shellcheck", str(SMOKE))
    assert answer.returncode == 0, answer.stdout


def test_it_says_what_is_missing(tmp_path: Path) -> None:
    for tool in ("dirname", "sh"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    answer = run("/bin/sh", str(SMOKE), PATH=str(tmp_path))
    assert answer.returncode == 1
    assert answer.stderr == "FAILED: docker is not installed\n"


def test_it_refuses_what_it_does_not_know() -> None:
    answer = run("/bin/sh", str(SMOKE), "--gpu")
    assert answer.returncode == 2
    assert "usage:" in answer.stderr


def test_it_calls_routes_that_exist_and_sets_variables_that_exist() -> None:
    text = SMOKE.read_text()
    called = {path.replace("$task", "{task}") for path in re.findall(r"/v1/tasks/[$\w/]+", text)}
    assert called == {"/v1/tasks/{task}/compile", "/v1/tasks/{task}/generate"}
    assert called <= {path for method, path in routes() if method == "POST"}
    settings = text.split("<<EOF\n")[1].split("\nEOF")[0]
    names = {line.split("=")[0] for line in settings.splitlines()}
    assert names <= set(example_settings())
    assert {"REDIS_PASSWORD", "GRAFANA_PASSWORD"} <= names
