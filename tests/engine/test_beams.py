"""Beam searches in the engine: found whatever happens around them, and gone with all they held."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from prefixd_server.engine.engine import StepFailed
from prefixd_server.errors import DeadlineExceeded, EngineDead, InvalidRequest
from prefixd_server.kv.allocator import pages_for
from prefixd_server.types import BeamParams, FinishReason
from tests.engine.engine_rig import BOOM, EOS, NAN, Rig

PROMPT = (1, 2, 3, 4, 5, 6)
LONG = {"max_new_tokens": 20, "beams": BeamParams(4, 4, 2.0, "never")}
"""goes on to the limit: length pays, and nothing may end it early"""


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path, num_pages=60, max_num_seqs=12)


@pytest.mark.parametrize("seed", range(16))
def test_random_traces_find_what_a_search_alone_finds(seed: int, tmp_path: Path) -> None:
    rng = Random(seed)
    rig = Rig(
        tmp_path,
        num_pages=rng.randint(22, 40),
        max_num_seqs=rng.randint(4, 12),
        max_num_batched_tokens=rng.choice([4, 7, 64]),
    )
    for _ in range(50):
        for _ in range(rng.choice([0, 0, 1, 1, 2])):
            prompt = [rng.randint(1, 13) for _ in range(rng.randint(1, 10))]
            task = rng.choice([None, "t0", "t1", "t2"])
            k = rng.randint(2, 4)
            beams = BeamParams(
                k, rng.randint(1, k), rng.choice([0.8, 1, 2]), rng.choice([True, False, "never"])
            )
            rig.submit(
                prompt,
                task,
                max_new_tokens=rng.randint(1, 12),
                beams=rng.choice([None, beams, beams]),
            )
        if rng.random() < 0.1:
            rig.abort(f"r{rng.randrange(max(1, len(rig.requests)))}")
        if rig.world.executor.jobs:
            rig.world.executor.run_all()
        rig.step()
    rig.finish_all()
    rig.assert_empty()
    for request_id, request in rig.requests.items():
        if rig.finish(request_id).reason is FinishReason.ABORTED:
            assert rig.hypotheses(request_id) == []
        elif request.sampling.beams is None:
            assert rig.tokens(request_id) == rig.expected(request_id)
        else:
            assert rig.hypotheses(request_id) == rig.expected_hypotheses(request_id)
            assert all(output.tokens == () for output in rig.outputs[request_id])


def test_the_traces_throw_searches_out(tmp_path: Path) -> None:
    rig = Rig(tmp_path, num_pages=22, max_num_seqs=12)
    ids = [rig.submit([i, *PROMPT], max_new_tokens=12, beams=BeamParams(3, 3)) for i in range(1, 6)]
    rig.finish_all()
    assert rig.engine.scheduler.num_preemptions > 1
    for request_id in ids:
        assert rig.hypotheses(request_id) == rig.expected_hypotheses(request_id)
    rig.assert_empty()


def test_how_a_search_is_told(rig: Rig) -> None:
    request_id = rig.submit(PROMPT, **LONG)
    rig.step()
    (first,) = rig.outputs[request_id]
    assert first.started is not None
    assert first.started.prompt_token_ids == PROMPT
    rig.finish_all()
    _, last = rig.outputs[request_id]
    assert last.finish is not None
    assert last.finish.reason is last.finish.hypotheses[0].reason
    assert len(last.finish.hypotheses) == 4
    for found in last.finish.hypotheses:
        expected = FinishReason.EOS if found.tokens[-1].id == EOS else FinishReason.LENGTH
        assert found.reason is expected


def test_one_token_is_found_in_one_step(rig: Rig) -> None:
    request_id = rig.submit(PROMPT, max_new_tokens=1, beams=BeamParams(3, 3))
    rig.step()
    assert rig.hypotheses(request_id) == rig.expected_hypotheses(request_id)
    assert rig.outputs[request_id][0].started is not None


def test_ignore_eos_and_stop_tokens(rig: Rig) -> None:
    on = rig.submit(PROMPT, ignore_eos=True, **LONG)
    stop = rig.submit(PROMPT, ignore_eos=True, stop_token_ids=frozenset({EOS}), **LONG)
    rig.finish_all()
    assert {h.reason for h in rig.finish(on).hypotheses} == {FinishReason.LENGTH}
    assert rig.hypotheses(stop) == rig.expected_hypotheses(stop)
    reasons = {h.reason for h in rig.finish(stop).hypotheses}
    assert reasons <= {FinishReason.STOP, FinishReason.LENGTH}


def test_beams_of_a_prompt_share_its_pages(rig: Rig) -> None:
    prompt = [1 + i % 13 for i in range(22)]
    rig.submit(prompt, max_new_tokens=9, ignore_eos=True, beams=BeamParams(8, 8, 1.0, "never"))
    rig.step()  # max_num_batched_tokens is 16: two chunks
    rig.step()
    most, steps = 0, 0
    while rig.engine.has_work:
        rig.step()
        most, steps = max(most, rig.world.allocator.num_used), steps + 1
    size = rig.world.allocator.page_size
    full = len(prompt) // size
    assert steps == 8
    assert full < most <= full + 8 * (pages_for(len(prompt) + 9, size) - full)


def test_an_abort_and_a_deadline_give_everything_back(rig: Rig) -> None:
    aborted, late = rig.submit(PROMPT, **LONG), rig.submit(PROMPT, deadline=5.0, **LONG)
    for _ in range(4):
        rig.step()
    assert rig.engine.num_running == 2
    rig.abort(aborted)
    rig.step()
    assert rig.finish(aborted).reason is FinishReason.ABORTED
    rig.now = 5.0
    rig.step()
    assert isinstance(rig.error(late), DeadlineExceeded)
    rig.assert_empty()


def test_a_search_that_is_waiting_to_go_on_can_be_aborted(tmp_path: Path) -> None:
    rig = Rig(tmp_path, num_pages=22, max_num_seqs=12)
    ids = [rig.submit([i, *PROMPT], **{**LONG, "max_new_tokens": 12}) for i in range(1, 4)]
    while not rig.engine.scheduler.num_preemptions:
        rig.step()
    (waiting,) = rig.engine.scheduler.waiting[-1:]
    rig.abort(waiting.request_id)
    rig.step()
    assert rig.finish(waiting.request_id).reason is FinishReason.ABORTED
    rig.finish_all()
    for request_id in ids:
        if request_id != waiting.request_id:
            assert rig.hypotheses(request_id) == rig.expected_hypotheses(request_id)
    rig.assert_empty()


def test_logits_that_are_not_finite_fail_only_their_search(rig: Rig) -> None:
    broken, beside = rig.submit([NAN, 1], **LONG), rig.submit(PROMPT, **LONG)
    drawn = rig.submit(PROMPT)
    rig.finish_all()
    assert isinstance(rig.error(broken), StepFailed)
    assert rig.hypotheses(beside) == rig.expected_hypotheses(beside)
    assert rig.tokens(drawn) == rig.expected(drawn)
    rig.assert_empty()


def test_a_forward_that_raises_ends_a_forked_search_once(rig: Rig) -> None:
    search = rig.submit(PROMPT, **LONG)
    rig.step()
    rig.step()
    rig.submit([BOOM, 1])
    rig.step()
    assert isinstance(rig.error(search), StepFailed)
    rig.assert_empty()


def test_close_ends_searches_at_any_stage(rig: Rig) -> None:
    forked, loading = rig.submit(PROMPT, **LONG), rig.submit(PROMPT, "t0", **LONG)
    rig.step()
    rig.step()
    rig.engine.close(EngineDead("over"))
    for request_id in (forked, loading):
        assert isinstance(rig.error(request_id), EngineDead)
    assert rig.world.allocator.num_used == 0


@pytest.mark.parametrize(
    ("limits", "num_beams", "message"),
    [
        ({"max_num_seqs": 3}, 4, "num_beams is 4; the server's max_num_seqs is 3"),
        (
            {"max_num_seqs": 8, "max_num_batched_tokens": 5},
            6,
            "num_beams is 6; the server's max_num_batched_tokens is 5",
        ),
        ({"num_pages": 12}, 4, "the request needs 21 pages of KV memory; the server has 12"),
    ],
)
def test_a_search_that_can_never_run_is_refused(
    tmp_path: Path, limits: dict[str, int], num_beams: int, message: str
) -> None:
    rig = Rig(tmp_path, **limits)
    refused = rig.submit(PROMPT[:4], max_new_tokens=20, beams=BeamParams(num_beams))
    rig.step()
    assert isinstance(rig.error(refused), InvalidRequest)
    assert message in str(rig.error(refused))
