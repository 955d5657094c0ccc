"""Tables at 80 columns: on a terminal of that width, and through a pipe, which has none."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta

import pytest
from rich.cells import cell_len
from rich.console import Console

from prefixd.cli import _table
from prefixd.cli._table import Column, print_pairs, print_table
from prefixd.cli._tasks import age
from tests.client.conftest import Cli, on_a_terminal
from tests.client.server import Server

NAME = "restaurant-reviews"
LONG = "what guests say of a restaurant, " * 9 + "to one line"


@pytest.fixture
def reviews(server: Server) -> Server:
    server.add_version(NAME, b"first")
    server.add_version(NAME, b"x" * 2_345_678)
    server.tasks[NAME] |= {"description": LONG, "pinned": True, "split": {1: 0.9, 2: 0.1}}
    server.add_version("b", b"other")
    server.tasks["b"]["description"] = "two\nlines"
    return server


def test_tasks_through_a_pipe_are_whole(cli: Cli, reviews: Server) -> None:
    head, b, long = cli("tasks").out.splitlines()
    assert head.split() == ["task", "traffic", "tokens", "running", "pinned", "description"]
    assert b.split(maxsplit=5) == ["b", "@1", "20", "0", "no", "two lines"]
    assert long == f"{NAME}  @1 90%, @2 10%      20        0  yes     {LONG}"
    assert head.index("description") == b.index("two lines") == long.index(LONG)


def test_on_a_terminal_only_the_description_gives_way(reviews: Server) -> None:
    head, b, long = on_a_terminal(reviews, "tasks")
    assert head.split() == ["task", "traffic", "tokens", "running", "pinned", "description"]
    assert b.endswith("no      two lines")
    assert long == f"{NAME}  @1 90%, @2 10%      20        0  yes     {LONG}"[:79] + "…"


def test_versions_fit_80_columns(cli: Cli, reviews: Server) -> None:
    shas = [sha256[:12] for sha256 in reviews.tasks[NAME]["versions"].values()]
    lines = cli("versions", NAME).out.splitlines()
    assert on_a_terminal(reviews, "versions", NAME) == lines
    assert max(map(len, lines)) <= 80
    head, first, second = (" ".join(line.split()) for line in lines)
    assert head == "version weight tokens size residency base age sha256"
    assert first.startswith("1 0.9 20 5 bytes device unverified ")
    assert second.startswith("2 0.1 20 2.3 MB device unverified ")
    assert [line[-12:] for line in lines[1:]] == shas
    assert cli("show", NAME).out.splitlines()[-4:] == ["", *lines]


def test_a_description_commands_no_terminal(reviews: Server) -> None:
    reviews.tasks["b"]["description"] = "\x1b]0;mine\x07 \x9b31mred\u202e"
    shown = "\ufffd]0;mine\ufffd \ufffd31mred\ufffd"
    assert on_a_terminal(reviews, "tasks")[1].endswith(shown)
    assert on_a_terminal(reviews, "show", "b")[1].endswith(shown)


def test_show_and_info_are_whole(cli: Cli, reviews: Server) -> None:
    shown = cli("show", NAME).out.splitlines()
    assert f"description       {LONG}" in shown
    assert "traffic           @1 90%, @2 10%" in shown
    assert "model.max_model_len      2048" in cli("info").out.splitlines()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 24 columns gets."""
    written = io.StringIO()
    console = Console(file=written, width=24, force_terminal=True, color_system=None)
    monkeypatch.setattr(_table, "stdout", console)
    return written


def test_cells_are_measured_as_a_terminal_shows_them(narrow: io.StringIO) -> None:
    columns = [Column("what", gives_way=True), Column("count", right=True), Column("name")]
    print_table(columns, [["日本語日本語", "7", "[b]x[/]"], ["a", "12345678", "é"]])
    lines = narrow.getvalue().splitlines()
    assert lines == [
        "what      count  name",
        "日本…         7  [b]x[/]",
        "a      12345678  é",
    ]
    assert max(map(cell_len, lines)) <= 24


def test_what_cannot_give_way_is_whole_however_narrow(narrow: io.StringIO) -> None:
    print_table([Column("sha256"), Column("why", gives_way=True)], [["0" * 64, "because"]])
    print_pairs(("fingerprint", "f" * 64), ("none", ""))
    rows = narrow.getvalue().splitlines()
    assert rows[1:] == ["0" * 64 + "  be…", "fingerprint  " + "f" * 64, "none"]


def test_an_age_is_in_its_largest_unit() -> None:
    now = datetime(2026, 1, 31, tzinfo=UTC)
    seconds = [-5, 0, 59, 60, 3599, 3600, 86_399, 86_400, 400 * 86_400]
    ages = [age(now - timedelta(seconds=s), now) for s in seconds]
    assert ages == ["0s", "0s", "59s", "1m", "59m", "1h", "23h", "1d", "400d"]
