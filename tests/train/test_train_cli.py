"""`prefixd train`: one command from a file to a task that answers; on two devices the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixd.cli._train import needs_train_extra
from prefixd_train.options import PANELS, TrainOptions
from prefixd_train.run_folder import RunFolder
from tests.support.models import tiny_model_folder
from tests.support.server import LiveServer
from tests.train.conftest import ROWS, Write, run

ROOT = Path(__file__).parents[2]


# Forked after the imports, which take longer than the run. What torchrun itself calls.
TORCHRUN = """
import sys
import prefixd_train.train
from prefixd.cli import main
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def run(arguments):
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    if code:
        raise RuntimeError(f"exit status {code}")

config = LaunchConfig(
    min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=0, run_id="two",
    rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
)
elastic_launch(config, run)(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def server(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(llama_folder, str(tmp_path_factory.mktemp("store"))) as live:
        yield live


@pytest.fixture
def arguments(llama_folder: Path, tmp_path: Path, write: Write) -> list[str]:
    settings = {
        "model": llama_folder,
        "data": write(ROWS),
        "task": "e2e",
        "out": tmp_path / "run",
        "num-virtual-tokens": 8,
        "max-steps": 8,
        "lr": 0.3,
        "device": "cpu",
        "threads": 1,
    }
    return ["train", *(f"--{name}={value}" for name, value in settings.items())]


def test_from_a_file_to_a_task_that_answers(
    arguments: list[str], server: LiveServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with server.client() as client:
        assert run([*arguments, f"--push={server.url}", "--dev-fraction=0.25"]) == 0
        said = capsys.readouterr()
        assert "e2e@1 (active); try it:" in said.out
        assert "step 8/8: loss" in said.err
        curl = subprocess.run(
            ["bash", "-c", "curl -sS --fail-with-body" + said.out.split("curl", 1)[1]],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert curl.returncode == 0, curl.stderr
        answer = json.loads(curl.stdout)
        assert (answer["task"], answer["version"]) == ("e2e", 1)
        assert answer["usage"]["prefix_tokens"] == 8
        version = client.version("e2e", 1)
        assert version.verified
        assert version.provenance["card"].startswith("# e2e\n")
        assert run([*arguments[:-1], "--resume", f"--push={server.url}"]) == 1
        assert "dev_fraction was 0.25, is 0.0" in capsys.readouterr().err


def test_chats_make_a_task_of_chats(
    arguments: list[str],
    server: LiveServer,
    write: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its inputs are a user's messages, and the line that is printed sends one."""
    said = ("Is it open?", "Where is the library?")
    answer = {"role": "assistant", "content": "By the river."}
    write([{"messages": [{"role": "user", "content": text}, answer]} for text in said])
    with server.client() as client:
        arguments += ["--task=library", "--max-steps=1", f"--push={server.url}"]
        assert run(arguments) == 0
        assert '{"inputs": "Is it open?"}' in capsys.readouterr().out
        assert client.task("library").defaults["chat_template"] == "model"
        prompt = client.generate("library", said[0], max_new_tokens=1).usage.prompt_tokens
        assert prompt > 2 * len(said[0].split())


def test_a_server_of_another_model_is_refused_before_training(
    arguments: list[str],
    server: LiveServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tiny_model_folder("gpt2", tmp_path / "gpt2")
    assert run([*arguments, f"--model={other}", f"--push={server.url}"]) == 1
    assert "serves another model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--lr=-1"], 2, "--lr: Input should be greater than 0 (got -1.0)"),
        (["--patience=2"], 2, "patience needs dev"),
        (["--data=missing.jsonl"], 1, "missing.jsonl"),
        (["--model=/nowhere"], 1, "/nowhere: there is no such folder"),
        (["--method=distill"], 2, "data is of no use to method distill"),
        (["--sites=cross"], 1, "sites 'cross'"),
        (["--prompt-template={text}"], 1, "train.jsonl:1: has no text"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    code: int,
    message: str,
) -> None:
    assert run([*arguments, *more]) == code
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert message in said


def test_every_setting_is_an_option() -> None:
    listed = [name for names in PANELS.values() for name in names]
    assert sorted(listed) == sorted(TrainOptions.model_fields)


@pytest.mark.parametrize(("module", "mended"), [("torch", True), ("prefixd_train.x", False)])
def test_what_the_extra_would_mend(module: str, mended: bool) -> None:
    assert needs_train_extra(ModuleNotFoundError(name=module)) == mended


def test_without_the_extra_it_says_how_to_install_it(arguments: list[str]) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from prefixd.cli import main;"
        "sys.exit(main(sys.argv[1:]))"
    )
    result = python(["-c", code, *arguments])
    assert result.returncode == 1
    assert "error: training needs torch: pip install 'prefixd[train]'" in result.stderr


def test_two_processes_train_what_one_does(arguments: list[str], tmp_path: Path) -> None:
    """Batches are shared, sums are over both: the losses are the same but for rounding."""
    arguments = [*arguments, "--batch-size=3", "--grad-accum=2", "--dev-fraction=0.25"]
    assert run([*arguments, "--log-every=1"]) == 0
    two = tmp_path / "two"
    result = python(["-c", TORCHRUN, *arguments, "--log-every=1", f"--out={two}"])
    assert result.returncode == 0, result.stderr[-2000:]
    alone, shared = losses(tmp_path / "run"), losses(two)
    assert [step for step, _ in shared] == [step for step, _ in alone]
    assert [loss for _, loss in shared] == pytest.approx([loss for _, loss in alone], rel=1e-4)


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = RunFolder(folder).read_metrics()
    return [(line["step"], line.get("loss", line.get("dev_loss"))) for line in lines]


def python(arguments: list[str]) -> Any:
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_page_shows_what_runs(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (rows,) = [text for language, text in blocks if not language]
    (code,) = [text for language, text in blocks if language == "python"]
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text(rows)
    exec(code.replace("TrainOptions(", f"TrainOptions(model={str(llama_folder)!r}, "), {})
    assert Path("runs/e2e/prefix.safetensors").exists()
