"""The code of docs/client.md runs, and its table of errors is the one in the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from prefixd import PrefixdError
from tests.client.server import TEXT, Server

DOC = (Path(__file__).parents[2] / "docs" / "client.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)


def test_the_examples_run(
    server: Server,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder.parent / "checkpoints").mkdir()
    folder.rename(folder.parent / "checkpoints" / "e2e")
    monkeypatch.chdir(folder.parent)
    for block in BLOCKS:
        code = block.replace("http://127.0.0.1:8000", server.url)
        exec(compile(code, "docs/client.md", "exec"), {})
    assert len(BLOCKS) == 3
    assert capsys.readouterr().out.count(TEXT) == 4


def test_the_tree_is_the_same_in_the_docs() -> None:
    (drawn,) = re.findall(r"```\n(PrefixdError\n.*?)\n```", DOC, re.DOTALL)
    assert drawn in inspect.getdoc(PrefixdError).replace("\n    ", "\n")  # type: ignore[union-attr]
