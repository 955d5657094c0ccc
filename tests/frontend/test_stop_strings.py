from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixd_server.frontend.stop_strings import StopChecker

LETTERS = st.text(alphabet="abc", max_size=12)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    checker = StopChecker(stops)
    return "".join(map(checker.feed, pieces)) + checker.flush(), checker.matched


@given(stops=STOPS, pieces=st.lists(LETTERS, max_size=8))
def test_equals_searching_the_whole_text(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    found = [text.find(stop) for stop in stops if stop in text]
    assert run(stops, pieces) == (text[: min(found, default=None)], bool(found))


@given(stops=STOPS, pieces=st.lists(LETTERS, max_size=8))
def test_holds_back_less_than_the_longest_stop(stops: list[str], pieces: list[str]) -> None:
    checker = StopChecker(stops)
    pending = 0
    for piece in pieces:
        pending += len(piece) - len(checker.feed(piece))
        if checker.matched:
            break
        assert 0 <= pending < max(map(len, stops), default=1)


def test_one_character_at_a_time() -> None:
    checker = StopChecker(["\nUser:"])
    assert [checker.feed(character) for character in "hi\nUs\nUser:x"] == [
        *("h", "i", "", "", ""),
        *("\nUs", "", "", "", "", "", ""),
    ]
    assert checker.matched
    assert checker.flush() == ""


@pytest.mark.parametrize(("tail", "text"), [("d", ""), ("x", "a"), ("", "a")])
def test_a_match_waits_for_an_earlier_one(tail: str, text: str) -> None:
    assert run(["abcd", "bc"], ["abc", tail]) == (text, True)


def test_what_is_held_comes_out_at_the_end() -> None:
    assert run(["END"], ["the E", "N"]) == ("the EN", False)
