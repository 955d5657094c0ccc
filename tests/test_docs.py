"""What README and docs say is true: what they name exists, and the code they show runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from prefixd.cli import app
from prefixd_server.config import CacheConfig
from prefixd_server.demo import TASKS, prepare
from tests.support.models import demo_folder
from tests.support.server import LiveServer, wait_until

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "README.md"]
URL = "http://127.0.0.1:8000"

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# --- what is named exists ------------------------------------------------------------------------


@cache
def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def flags(command: Any) -> set[str]:
    named = [name for parameter in command.params for name in parameter.opts]
    named += [name for parameter in command.params for name in parameter.secondary_opts]
    return {name for name in named if name.startswith("--")} | {"--help"}


def code(page: Path) -> list[str]:
    """Lines of fenced blocks (continued lines joined) and inline code."""
    text = page.read_text()
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced for line in _joined(block).splitlines()]
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]


def _joined(block: str) -> str:
    # A command goes on after a backslash, and in a synopsis where the line is indented.
    return re.sub(r"\\?\n {8,}|\\\n", " ", block)


@pages
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    files = [link.partition("#")[0] for link in links if not re.match(r"https?:|#|mailto:", link)]
    assert [link for link in files if not (page.parent / link).exists()] == []


@pages
def test_commands_and_their_flags_exist(page: Path) -> None:
    for line in code(page):
        for name, rest in re.findall(r"(?:^|\| |\$ )(?:\S*/)?prefixd ([a-z]+)\b(.*)", line):
            assert name in commands(), line
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)) <= flags(commands()[name]), (
                line
            )


@pages
def test_flags_that_stand_alone_exist(page: Path) -> None:
    known = set().union(*(flags(command) for command in commands().values()))
    known |= set(re.findall(r"--[a-z-]+", (ROOT / "docker" / "smoke.sh").read_text()))
    for script in (ROOT / "bench").rglob("*.py"):
        known |= set(re.findall(r"--[a-z-]+", script.read_text()))
    alone = {span.split()[0] for span in code(page) if span.startswith("--")}
    assert alone <= known


@pages
def test_variables_are_settings(page: Path) -> None:
    settings = {parameter.envvar for command in commands().values() for parameter in command.params}
    named = set(re.findall(r"\bPREFIXD_[A-Z_]*[A-Z]\b", page.read_text()))
    # Read where the kernels are compiled and chosen, for which there may be no server yet.
    assert named - {"PREFIXD_NATIVE_DIR", "PREFIXD_NATIVE_ISA"} <= settings


@pages
def test_make_targets_exist(page: Path) -> None:
    named = {target for line in code(page) for target in re.findall(r"^make ([a-z]+)", line)}
    assert named <= targets()


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_readme_lists_every_target() -> None:
    listed = re.findall(r"^\| `make ([a-z]+)` \|", README.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(targets() - {"help"})


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\((docs/[a-z]+\.md)\)", README.read_text()))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


# --- what is shown runs --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The demo's model and tasks, as `make demo` serves them."""
    store = str(tmp_path_factory.mktemp("store"))
    cache = CacheConfig(kv_cache_bytes=256 << 20)
    with LiveServer(demo_folder(), store, cache=cache) as server, server.client() as client:
        prepare(server.url)
        wait_until(
            lambda: sum(bool(task.description) for task in client.tasks()) == len(TASKS),
            timeout=120,
            what="the demo's tasks",
        )
        yield server


def blocks(page: Path, language: str, url: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [block.replace(URL, url) for block in found]


def shell(script: str, folder: Path, url: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-euc", script],
        cwd=folder,
        env={**os.environ, "PATH": path, "PREFIXD_URL": url},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_curl_lines_of_the_readme(demo: LiveServer, tmp_path: Path) -> None:
    (block,) = [block for block in blocks(README, "sh", demo.url) if "curl" in block]
    answers = [
        shell(line.replace("curl", "curl -sS --fail-with-body", 1), tmp_path, demo.url)
        for line in block.strip().split("\n\n")
    ]
    booking, base, describe, sentiment, streamed, compiled, listed = answers
    told = json.loads(booking)["generated_text"]
    assert json.loads(told)["name"] == "Beatrix Moreau"
    assert told.strip() in README.read_text()
    assert json.loads(base)["generated_text"].strip() != told.strip()
    assert "Blue Spice" in json.loads(describe)["generated_text"]
    assert json.loads(sentiment)["generated_text"].strip() in {"positive", "negative"}
    assert json.loads(sentiment)["details"]["tokens"]
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line]
    assert events[-1]["generated_text"] == "".join(event["token"]["text"] for event in events) != ""
    assert json.loads(compiled)["task"] == "pirate"
    names = {task["task"] for task in json.loads(listed)["tasks"]}
    assert names >= {"pirate", *(task.name for task in TASKS)}


@pytest.mark.slow
def test_the_two_commands_from_a_file_to_scores(demo: LiveServer, tmp_path: Path) -> None:
    """The README's rows and commands, with one step of training and few tokens."""
    (script,) = [block for block in blocks(README, "sh", demo.url) if "prefixd train" in block]
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    (rows,) = [block for language, block in fenced if not language and block.startswith("{")]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(rows)
    lines = [line for line in script.splitlines() if line.startswith("prefixd")]
    few = {"train": " --max-steps 1 --num-virtual-tokens 4 --threads 1 --device cpu"}
    few |= {"evaluate": " --max-new-tokens 4 --resamples 10"}
    assert [line.split()[1] for line in lines] == list(few)
    trained, scored = (shell(line + few[line.split()[1]], tmp_path, demo.url) for line in lines)
    assert "restaurants@1 (active); try it:" in trained
    assert "restaurants@1, 2 inputs" in scored
    assert (tmp_path / "scores" / "scores.json").exists()


@pytest.mark.slow
def test_the_way_from_peft_to_a_stream(
    demo: LiveServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is saved is not trained; that it is read is the point here."""
    save, stream = blocks(README, "python", demo.url)
    (push,) = [block for block in blocks(README, "sh", demo.url) if "prefixd push" in block]
    monkeypatch.chdir(tmp_path)
    run_python(save)
    assert "created mytask@1 (active): 20 virtual tokens" in shell(push, tmp_path, demo.url)
    capsys.readouterr()
    run_python(stream)
    assert re.search(r"1 prompt_tokens=\d+ completion_tokens=\d+", capsys.readouterr().out)


@pytest.mark.slow
def test_the_hugging_face_client_of_the_api_page(
    demo: LiveServer, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks(ROOT / "docs" / "api.md", "python", demo.url)
    run_python(block)
    assert "Blue Spice" in capsys.readouterr().out


def run_python(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})
