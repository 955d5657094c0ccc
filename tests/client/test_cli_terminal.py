"""A model's text on a terminal commands nothing; through a pipe it is what the model wrote."""

from __future__ import annotations

import pytest

from tests.client import server as fake
from tests.client.conftest import Cli, on_a_terminal
from tests.client.server import Server

RUDE = ["\x1b]0;a title\x07", "\x1b[31m", "\tred\r\nand", " \x9b2J\u202e"]
"""renames the window, colours, goes back to the line's start, clears, turns the direction"""


@pytest.fixture
def rude(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(fake, "TOKENS", RUDE)
    monkeypatch.setattr(fake, "TEXT", "".join(RUDE))
    server.add_version("rude", b"prefix")
    return server


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_on_a_terminal(rude: Server, how: str) -> None:
    first, second = on_a_terminal(rude, "generate", "rude", "hi", how)
    assert first == "�]0;a title��[31m\tred�"
    assert second == "and �2J�"


def test_tokens_on_a_terminal(rude: Server) -> None:
    lines = on_a_terminal(rude, "generate", "rude", "hi", "--details")
    assert not any(control in line for line in lines for control in "\x1b\x07\r\x9b\u202e")
    assert any("\\u001b[31m" in line for line in lines)


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_through_a_pipe(cli: Cli, rude: Server, how: str) -> None:
    assert cli("generate", "rude", "hi", how).out == "".join(RUDE) + "\n"
