"""What prompts have in common is computed once, and never found by whom it is not for.

The rig's runner asserts in every step that each page a sequence holds was computed for its tenant,
its prefix and its tokens.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from prefixd_server.engine.engine import StepFailed
from prefixd_server.types import BeamParams, FinishReason, PrefixState
from tests.engine.engine_rig import BOOM, NAN, Rig

HEAD = (1, 2, 3, 4, 5, 6, 7, 8)
"""two pages"""


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def computed(rig: Rig, *args: object, **options: object) -> int:
    """How many tokens a request takes to compute, from its submission to its end."""
    before = rig.runner.num_computed
    request_id = rig.submit(*args, **{"max_new_tokens": 1, **options})  # type: ignore[arg-type]
    rig.finish_all()
    assert rig.tokens(request_id) == rig.expected(request_id)
    return rig.runner.num_computed - before


def num_cached(rig: Rig) -> int:
    return len(rig.engine.scheduler.prompt_cache.pages)


@pytest.mark.parametrize("seed", range(5))
def test_random_traces_with_heads_in_common(seed: int, tmp_path: Path) -> None:
    """100 requests in few pages: every answer is the one without a cache, and many tokens less
    are computed."""
    rng = Random(seed)
    rig = Rig(
        tmp_path,
        num_pages=rng.randint(12, 30),
        max_num_seqs=rng.randint(1, 8),
        max_num_batched_tokens=rng.choice([4, 6, 64]),
    )
    heads = [[rng.randint(1, 13) for _ in range(rng.randint(1, 16))] for _ in range(3)]
    while len(rig.requests) < 100:
        for _ in range(rng.choice([0, 0, 1, 1, 3])):
            prompt = [*rng.choice(heads), *(rng.randint(1, 3) for _ in range(rng.randrange(8)))]
            prompt[0] = rng.choice([prompt[0]] * 30 + [NAN, BOOM])
            task = rng.choice([None, None, "t0", "t1"])
            beams = rng.choice([None] * 5 + [BeamParams(2, 2)])
            rig.submit(
                prompt,
                task,
                tenant="other" if task is None and rng.random() < 0.3 else "default",
                capture_kv=beams is None and rng.random() < 0.05,
                prompt_logprobs=beams is None and rng.random() < 0.05,
                max_new_tokens=rng.randint(1, 9 if beams else 20),
                beams=beams if rig.engine.scheduler.max_num_seqs > 1 else None,
            )
        if rng.random() < 0.1:
            rig.abort(f"r{rng.randrange(max(1, len(rig.requests)))}")
        if rig.world.executor.jobs:
            rig.world.executor.run_all()
        rig.step()
    rig.finish_all()
    for request_id, request in rig.requests.items():
        finish = rig.finish(request_id)
        if finish.reason in (FinishReason.ABORTED, FinishReason.ERROR):
            assert rig.tokens(request_id) == rig.expected(request_id)[: len(rig.tokens(request_id))]
        elif request.capture_kv:
            assert finish.compiled is not None
        elif request.sampling.beams is not None:
            assert rig.hypotheses(request_id) == rig.expected_hypotheses(request_id)
        else:
            assert rig.tokens(request_id) == rig.expected(request_id)
    assert rig.engine.scheduler.prompt_cache.num_hit_tokens > 0
    rig.assert_empty()


def test_the_traces_evict_and_preempt(tmp_path: Path) -> None:
    rig = Rig(tmp_path, num_pages=12, max_num_seqs=6)
    ids = [rig.submit([*HEAD, 1 + i % 5], max_new_tokens=20) for i in range(30)]
    rig.finish_all()
    for request_id in ids:
        assert rig.tokens(request_id) == rig.expected(request_id)
    scheduler = rig.engine.scheduler
    assert scheduler.num_preemptions > 0
    assert scheduler.prompt_cache.pages.num_evictions > 0
    assert scheduler.prompt_cache.num_hit_tokens > 20 * len(HEAD)


# --- what is found ------------------------------------------------------------------------------


def test_full_pages_are_found_but_the_last_token_is_computed(rig: Rig) -> None:
    assert computed(rig, HEAD) == 8
    assert computed(rig, [*HEAD, 9, 10]) == 2
    assert computed(rig, [*HEAD[:6], 9]) == 3
    assert computed(rig, HEAD) == 4, "all of it is there; the page of its last token is not taken"
    assert computed(rig, HEAD[1:]) == 7
    cache = rig.engine.scheduler.prompt_cache
    assert cache.num_queried_tokens == 8 + 10 + 7 + 8 + 7
    assert cache.num_hit_tokens == 8 + 4 + 4


def test_two_that_run_share_the_physical_pages(rig: Rig) -> None:
    rig.submit([*HEAD, 9], max_new_tokens=9, ignore_eos=True)
    rig.step()
    used = rig.world.allocator.num_used
    rig.submit([*HEAD, 10], max_new_tokens=9, ignore_eos=True)
    rig.step()
    first, second = (sequence.pages for sequence in rig.engine.scheduler.running)
    assert first[:2] == second[:2]
    assert rig.world.allocator.num_used == used + 1
    assert [rig.world.allocator.references(page) for page in first] == [2, 2, 1]
    rig.finish_all()
    rig.assert_empty()


def test_the_next_turn_finds_the_answer(rig: Rig) -> None:
    first = rig.submit(HEAD, max_new_tokens=9, ignore_eos=True)
    rig.finish_all()
    answer = rig.tokens(first)
    # The last token generated was never an input.
    assert computed(rig, [*HEAD, *answer, 9, 9, 9]) == 4


def test_a_search_and_a_request_find_each_others_prompt(rig: Rig) -> None:
    search = rig.submit([*HEAD, 9], max_new_tokens=4, beams=BeamParams(3, 3))
    rig.finish_all()
    assert computed(rig, [*HEAD, 10]) == 1
    before = rig.runner.num_computed
    again = rig.submit([*HEAD, 9], max_new_tokens=1, beams=BeamParams(3, 3))
    rig.finish_all()
    assert rig.runner.num_computed - before == 1
    for request_id in (search, again):
        assert rig.hypotheses(request_id) == rig.expected_hypotheses(request_id)


def test_a_preempted_sequence_finds_its_own_pages(rig: Rig) -> None:
    request_id = rig.submit(HEAD, max_new_tokens=20, ignore_eos=True)
    for _ in range(5):
        rig.step()
    (sequence,) = rig.engine.scheduler.running
    rig.engine.scheduler._preempt(sequence)
    assert sequence.num_computed == 0
    before = rig.runner.num_computed
    rig.step()
    assert sequence.num_tokens == 8 + 6
    assert rig.runner.num_computed - before == 1
    rig.finish_all()
    assert len(rig.tokens(request_id)) == 20
    assert rig.engine.scheduler.prompt_cache.num_queried_tokens == 8, "it counts once"


# --- what is not --------------------------------------------------------------------------------


def test_tenants_and_prefixes_share_nothing(rig: Rig) -> None:
    for options in ({}, {"tenant": "other"}, {"task": "t0"}, {"task": "t1"}):
        prompt = [*HEAD, 9]
        assert computed(rig, prompt, **options) == 9, options
        assert computed(rig, prompt, **options) == 1, options


def test_requests_that_want_every_token_take_nothing(rig: Rig) -> None:
    assert computed(rig, HEAD) == 8
    assert computed(rig, HEAD, prompt_logprobs=True) == 8
    before = rig.runner.num_computed
    rig.submit(HEAD, capture_kv=True)
    rig.finish_all()
    assert rig.runner.num_computed - before == 8
    assert rig.engine.scheduler.prompt_cache.num_queried_tokens == 8


def test_a_prompt_in_chunks_is_found_when_it_has_run(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_num_batched_tokens=4)
    rig.submit(HEAD, max_new_tokens=1)
    rig.step()
    assert num_cached(rig) == 0
    rig.step()
    assert num_cached(rig) == 2


def test_what_a_broken_step_computed_is_not_found(rig: Rig) -> None:
    beside = rig.submit(HEAD, max_new_tokens=9, ignore_eos=True)
    rig.step()
    assert num_cached(rig) == 2
    broken = rig.submit([BOOM, *HEAD], max_new_tokens=1)
    rig.step()
    for request_id in (beside, broken):
        assert isinstance(rig.error(request_id), StepFailed)
    assert num_cached(rig) == 0
    assert computed(rig, [*HEAD, 9]) == 9


def test_a_step_that_breaks_after_a_request_has_ended_in_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = rig.submit(HEAD, max_new_tokens=1)
    rig.submit([13, *HEAD[:3]], capture_kv=True)

    def broken(sequence: object) -> None:
        raise RuntimeError("the KV cannot be read")

    monkeypatch.setattr(rig.runner, "read_kv", broken)
    rig.step()
    assert rig.tokens(ended) == rig.expected(ended)
    assert num_cached(rig) == 0


@pytest.mark.parametrize("beams", [None, BeamParams(2)])
def test_what_led_to_logits_that_are_not_finite_is_not_found(
    rig: Rig, beams: BeamParams | None
) -> None:
    prompt = [NAN, *HEAD]
    assert computed(rig, prompt) == 9
    assert num_cached(rig) == 2
    broken = rig.submit([*prompt, 9], max_new_tokens=5, beams=beams)
    rig.finish_all()
    assert isinstance(rig.error(broken), StepFailed)
    assert num_cached(rig) == 0, "what it began with was another's, and led there all the same"


def test_a_search_that_goes_on_offers_nothing_before_its_logits_were_looked_at(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = rig.submit([*HEAD, 9], max_new_tokens=9, beams=BeamParams(2, 2, 1.0, "never"))
    for _ in range(3):
        rig.step()
    (sequence,) = rig.engine.scheduler.running
    rig.engine.scheduler.prompt_cache.drop(sequence)
    rig.engine.scheduler._preempt(sequence)
    logits = rig.runner._logits
    monkeypatch.setattr(rig.runner, "_logits", lambda s: logits(s) * float("nan"))
    rig.step()
    assert isinstance(rig.error(search), StepFailed)
    assert num_cached(rig) == 0


def test_switched_off_nothing_is_kept(tmp_path: Path) -> None:
    rig = Rig(tmp_path, prompt_cache=False)
    assert [computed(rig, HEAD) for _ in range(2)] == [8, 8]
    cache = rig.engine.scheduler.prompt_cache
    assert (num_cached(rig), cache.num_queried_tokens, cache.num_hit_tokens) == (0, 0, 0)


# --- memory -------------------------------------------------------------------------------------


def test_cached_pages_are_free_and_go_before_idle_prefixes(tmp_path: Path) -> None:
    rig = Rig(tmp_path, num_pages=16, max_num_batched_tokens=64)
    computed(rig, HEAD, "t0")
    free = rig.world.allocator.num_free
    for i in range(1, 7):
        computed(rig, [i, *HEAD, *HEAD])
        assert rig.world.allocator.num_free == free
    assert rig.world.state(rig.world.versions[0]) is PrefixState.DEVICE
    cache = rig.engine.scheduler.prompt_cache
    assert cache.pages.num_evictions > 0
    assert num_cached(rig) <= free
    assert computed(rig, [6, *HEAD, *HEAD, 9]) == 2, "the latest is still there"
    assert computed(rig, [1, *HEAD, *HEAD]) == 17, "the oldest is not"


def test_a_prefix_that_was_loaded_again_finds_what_was_computed_with_it(rig: Rig) -> None:
    assert computed(rig, HEAD, "t0") == 8
    assert rig.world.residency.make_room(rig.world.allocator.num_pages, force=True)
    assert rig.world.state(rig.world.versions[0]) is not PrefixState.DEVICE
    assert computed(rig, [*HEAD, 9], "t0") == 1
