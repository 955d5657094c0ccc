from __future__ import annotations

import itertools

import pytest

from prefixd_server.prefix.lifecycle import NEW, Life, LifeEvent, advance
from prefixd_server.types import PrefixState

S, E = PrefixState, LifeEvent

LEGAL_MOVES = {
    (S.STORED, E.FETCH, S.LOADING),
    (S.LOADING, E.FETCHED, S.HOST),
    (S.HOST, E.COPY, S.LOADING),
    (S.LOADING, E.COPIED, S.DEVICE),
    (S.LOADING, E.FAIL, S.FAILED),
    (S.FAILED, E.RETRY, S.STORED),
    (S.HOST, E.DROP_HOST, S.STORED),
    (S.DEVICE, E.EVICT, S.HOST),
    (S.DEVICE, E.EVICT_ALL, S.STORED),
}
PLACES = [state for state in S if state is not S.RETIRING]
MOVES = [event for event in E if event not in (E.RETIRE, E.REVIVE, E.VANISH)]


@pytest.mark.parametrize("retiring", [False, True])
def test_exactly_the_legal_moves_are_allowed(retiring: bool) -> None:
    allowed = set()
    for place, event in itertools.product(PLACES, MOVES):
        try:
            life = advance(Life(place, retiring), event)
        except AssertionError:
            continue
        assert life is not None
        assert life.retiring is retiring
        allowed.add((place, event, life.place))
    assert allowed == LEGAL_MOVES


@pytest.mark.parametrize("place", PLACES)
def test_anything_can_retire_and_be_revived_where_it_was(place: PrefixState) -> None:
    retired = advance(Life(place), E.RETIRE)
    assert retired is not None
    assert retired.state is S.RETIRING
    assert advance(retired, E.REVIVE) == Life(place)
    with pytest.raises(AssertionError):
        advance(retired, E.RETIRE)
    with pytest.raises(AssertionError):
        advance(Life(place), E.REVIVE)


@pytest.mark.parametrize("place", PLACES)
def test_only_a_retiring_prefix_that_no_thread_loads_vanishes(place: PrefixState) -> None:
    with pytest.raises(AssertionError):
        advance(Life(place), E.VANISH)
    if place is S.LOADING:
        with pytest.raises(AssertionError):
            advance(Life(place, retiring=True), E.VANISH)
    else:
        assert advance(Life(place, retiring=True), E.VANISH) is None


def test_a_life_from_store_to_device_and_back() -> None:
    life = NEW
    seen = [life.state]
    for event in (E.FETCH, E.FETCHED, E.COPY, E.COPIED, E.EVICT, E.DROP_HOST):
        after = advance(life, event)
        assert after is not None
        life = after
        seen.append(life.state)
    assert seen == [S.STORED, S.LOADING, S.HOST, S.LOADING, S.DEVICE, S.HOST, S.STORED]
