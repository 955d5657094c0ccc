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
import torch

from prefixd.cli._train import needs_train_extra
from prefixd_store import read_manifest
from prefixd_train.initialise import from_prefix_file, from_text
from prefixd_train.lm import FrozenLM
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
        (["--data=."], 1, ". is a folder; a file is needed"),
        (["--dev=nothing"], 1, "nothing has no rows"),
        (["--init=words", "--init-file=nothing"], 1, "nothing is empty"),
        (["--init-file=latin1"], 1, "latin1 is not UTF-8: byte 3"),
        (["--init-file=short"], 1, "short: the text has 2 tokens; the prefix takes 8"),
        (["--init=prefix", "--init-from=short"], 1, "short: not a prefix: "),
        (["--init=prefix", "--init-from=."], 1, ". is a folder; a file is needed"),
        (["--mixed-precision=fp16"], 1, "mixed_precision fp16 needs a GPU"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_no_run(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nothing").touch()
    Path("latin1").write_bytes("caf\xe9 and more".encode("latin-1"))
    Path("short").write_text("too short")
    assert run([*arguments, *more]) == code
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert message in said
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "train.jsonl:2: the only row; training takes two or more"),
        (["--dev-fraction=0.5"], "train.jsonl:2: the only row; a dev split of 0.5 takes two"),
        (["--too-long=skip", "--max-length=60"], ":2: the only row that fits (1 skipped); train"),
    ],
)
def test_one_row_is_no_training_data(
    arguments: list[str],
    tmp_path: Path,
    write: Write,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    path = write(ROWS[:1])
    path.write_text("\n" + path.read_text())
    if "--too-long=skip" in more:
        path.write_text(path.read_text() + json.dumps({"source": "a " * 99, "target": "b"}))
    assert run([*arguments, *more]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_start_from_tokens_all_over_a_file(
    arguments: list[str], llama: FrozenLM, tmp_path: Path
) -> None:
    """Learning next to nothing, the prefix stays what the LM makes of that text."""
    text = "The town hall stands at the river; its clock was built in 1873 and still keeps time."
    (tmp_path / "text").write_text("\ufeff" + text)
    arguments += [f"--init-file={tmp_path / 'text'}", "--max-steps=1", "--lr=1e-9"]
    found = {}
    for choose in ("first", "even"):
        out = tmp_path / choose
        assert run([*arguments, f"--init-choose={choose}", f"--out={out}"]) == 0
        found[choose] = from_prefix_file(llama, out / "prefix.safetensors")["decoder"]
        expected = from_text(llama, text, {"decoder": 8}, choose=choose)  # type: ignore[arg-type]
        torch.testing.assert_close(found[choose], expected["decoder"])
    assert not torch.allclose(found["first"][0], found["even"][0])
    assert set(read_manifest(out / "prefix.safetensors").provenance) >= {"init_file_sha256"}
    (tmp_path / "text").write_text(text + " On Sundays it rings.")
    assert run([*arguments, "--init-choose=even", f"--out={out}", "--resume"]) == 1


def test_rows_that_are_left_out_are_counted(
    arguments: list[str], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write([*ROWS, *2 * [{"source": "a " * 99, "target": "b"}]])
    arguments += ["--too-long=skip", "--max-length=60", "--max-steps=1", "--dev-fraction=0.25"]
    assert run(arguments) == 0
    assert f"too long and left out: 2 of {path}" in capsys.readouterr().err.splitlines()


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
