"""Every request ends with exactly one terminal output, whatever happens to it or around it."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from prefixd_server.engine.engine import StepFailed
from prefixd_server.errors import (
    CorruptBlob,
    DeadlineExceeded,
    EngineDead,
    NotFound,
    PrefixdError,
    Unavailable,
)
from prefixd_server.types import FinishReason, PrefixState
from tests.engine.engine_rig import BOOM, EOS, NAN, Rig

PROMPT = (1, 2, 3)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


# --- all at once --------------------------------------------------------------------------------


def submit_random(rig: Rig, rng: Random) -> str:
    prompt = [rng.randint(1, 13) for _ in range(rng.randint(1, 20))]
    prompt[0] = rng.choice([prompt[0]] * 12 + [NAN, BOOM])
    return rig.submit(
        prompt,
        rng.choice([None, "t0", "t1", "t2", "unknown"]),
        deadline=rng.choice([float("inf"), float("inf"), rig.now + rng.randint(0, 30)]),
        capture_kv=rng.random() < 0.1,
        max_new_tokens=rng.randint(1, 20),
    )


def disturb(rig: Rig, rng: Random) -> None:
    world = rig.world
    match rng.randrange(5):
        case 0:
            rig.abort(f"r{rng.randrange(max(1, len(rig.requests)))}")
        case 1:
            rig.now += rng.randint(0, 5)
        case 2:
            sha256 = rng.choice(world.versions).sha256
            if world.store.errors.pop(sha256, None) is None:
                world.store.errors[sha256] = CorruptBlob("broken by the test")
        case _:
            if world.executor.jobs:
                world.executor.run(rng.randrange(len(world.executor.jobs)))


def check_answer(rig: Rig, request_id: str) -> None:
    finish, tokens = rig.finish(request_id), rig.tokens(request_id)
    request = rig.requests[request_id]
    if request.task == "unknown":
        assert isinstance(finish.error, NotFound)
        return
    expected = rig.expected(request_id)
    assert tokens == expected[: len(tokens)]
    assert (finish.error is not None) == (finish.reason is FinishReason.ERROR)
    if finish.compiled is not None:
        assert request.capture_kv
        assert tokens == []
        assert finish.compiled.shape[2] == len(request.prompt_token_ids)
    elif finish.reason in (FinishReason.EOS, FinishReason.LENGTH):
        assert tokens == expected
        assert (finish.reason is FinishReason.EOS) == (tokens[-1] == EOS)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("seed", range(16))
def test_random_traces_end_every_request_once_and_leak_nothing(
    seed: int, asynchronous: bool, tmp_path: Path
) -> None:
    rng = Random(seed)
    rig = Rig(
        tmp_path,
        asynchronous=asynchronous,
        num_pages=rng.randint(11, 24),
        max_num_seqs=rng.randint(1, 8),
        max_num_batched_tokens=rng.choice([1, 6, 64]),
    )
    for _ in range(60):
        for _ in range(rng.choice([0, 0, 1, 1, 3])):
            submit_random(rig, rng)
        for _ in range(rng.randrange(3)):
            disturb(rig, rng)
        rig.step()
    rig.world.store.errors.clear()
    rig.finish_all()
    rig.assert_empty()
    for request_id in rig.requests:
        check_answer(rig, request_id)


def test_the_answer_does_not_depend_on_the_mix(tmp_path: Path) -> None:
    rig = Rig(tmp_path, num_pages=11, max_num_seqs=8, max_num_batched_tokens=6)
    ids = [
        rig.submit([i + 1, *PROMPT], task, max_new_tokens=14)
        for i, task in enumerate([None, "t0", "t1", "t2"] * 3)
    ]
    rig.finish_all()
    for request_id in ids:
        assert rig.tokens(request_id) == rig.expected(request_id)
    assert rig.engine.scheduler.num_preemptions > 0


# --- how a request ends ---------------------------------------------------------------------------


def test_outputs_wait_for_the_next_step_where_the_device_computes_beside(tmp_path: Path) -> None:
    rig = Rig(tmp_path, asynchronous=True)
    first = rig.submit(PROMPT, max_new_tokens=3)
    seen = []
    for _ in range(3):
        rig.step()
        seen.append(len(rig.tokens(first)))
    # The last step has none after it, so it tells all.
    assert seen == [0, 1, 3]
    second = rig.submit(PROMPT, max_new_tokens=5)
    rig.step()
    rig.engine.close(EngineDead("stopped"))
    assert len(rig.tokens(second)) == 1
    assert isinstance(rig.error(second), EngineDead)


def test_started_tells_what_was_run(rig: Rig) -> None:
    base, task = rig.submit(PROMPT), rig.submit(PROMPT, "t1")
    rig.finish_all()
    for request_id, version, prefix_tokens in ((base, None, 0), (task, 1, 7)):
        started = rig.outputs[request_id][0].started
        assert started is not None
        assert started.version == version
        assert started.prefix_tokens == prefix_tokens
        assert started.prompt_token_ids == PROMPT


def test_length_eos_and_stop_tokens(rig: Rig) -> None:
    full = rig.submit(PROMPT, max_new_tokens=60, ignore_eos=True)
    rig.finish_all()
    tokens = rig.tokens(full)
    assert rig.finish(full).reason is FinishReason.LENGTH
    assert len(tokens) == 60
    assert EOS in tokens
    eos = rig.submit(PROMPT, max_new_tokens=60)
    stop = rig.submit(PROMPT, max_new_tokens=60, stop_token_ids=frozenset({tokens[1]}))
    one = rig.submit(PROMPT, max_new_tokens=1)
    rig.finish_all()
    assert rig.finish(eos).reason is FinishReason.EOS
    assert rig.tokens(eos) == tokens[: tokens.index(EOS) + 1]
    assert rig.finish(stop).reason is FinishReason.STOP
    assert rig.tokens(stop) == tokens[: tokens.index(tokens[1]) + 1]
    assert rig.finish(one).reason is FinishReason.LENGTH
    assert rig.tokens(one) == tokens[:1]


def test_an_unknown_task_ends_with_not_found_and_is_never_the_base_model(rig: Rig) -> None:
    request_id = rig.submit(PROMPT, "unknown")
    assert not rig.step()
    assert isinstance(rig.error(request_id), NotFound)
    assert rig.tokens(request_id) == []
    rig.assert_empty()


def test_capture_returns_the_prompts_kv_and_generates_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_num_batched_tokens=2)
    request_id = rig.submit(PROMPT, capture_kv=True)
    rig.finish_all()
    finish = rig.finish(request_id)
    assert finish.compiled is not None
    assert finish.compiled.shape == (1, 1, 3, 2)
    assert finish.compiled.dtype == "float32"
    key = np.frombuffer(finish.compiled.key, np.float32)
    assert key.tolist() == [1, 1, 2, 2, 3, 3]
    assert np.frombuffer(finish.compiled.value, np.float32).tolist() == (-key).tolist()
    assert rig.tokens(request_id) == []
    started = rig.outputs[request_id][0].started
    assert started is not None
    assert started.prompt_token_ids == PROMPT
    rig.assert_empty()


def test_capture_keeps_bfloat16_bits(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    kv = torch.tensor([1.0, -2.5, 3.0]).bfloat16().view(1, 1, 3, 1)
    monkeypatch.setattr(rig.runner, "read_kv", lambda sequence: (kv, kv))
    request_id = rig.submit(PROMPT, capture_kv=True)
    rig.finish_all()
    compiled = rig.finish(request_id).compiled
    assert compiled is not None
    assert compiled.dtype == "bfloat16"
    assert np.frombuffer(compiled.key, np.uint16).tolist() == [0x3F80, 0xC020, 0x4040]


# --- abort ----------------------------------------------------------------------------------------


def test_an_abort_ends_the_request_in_the_next_step_with_its_memory(rig: Rig) -> None:
    gone, stays = rig.submit(PROMPT, max_new_tokens=20), rig.submit(PROMPT, max_new_tokens=4)
    rig.step()
    used = rig.world.allocator.num_used
    rig.abort(gone)
    rig.step()
    assert rig.finish(gone).reason is FinishReason.ABORTED
    assert rig.world.allocator.num_used < used
    assert len(rig.tokens(gone)) == 1
    rig.finish_all()
    assert rig.tokens(stays) == rig.expected(stays)


def test_an_abort_before_the_first_step_and_while_loading(rig: Rig) -> None:
    early = rig.submit(PROMPT)
    rig.abort(early)
    loading = rig.submit(PROMPT, "t0")
    rig.step()
    assert rig.finish(early).reason is FinishReason.ABORTED
    rig.abort(loading)
    rig.step()
    assert rig.finish(loading).reason is FinishReason.ABORTED
    rig.assert_empty()


def test_aborting_unknown_and_finished_requests_does_nothing(rig: Rig) -> None:
    request_id = rig.submit(PROMPT)
    rig.finish_all()
    outputs = list(rig.outputs[request_id])
    rig.abort(request_id)
    rig.abort("never-submitted")
    rig.step()
    assert rig.outputs[request_id] == outputs


# --- failures -------------------------------------------------------------------------------------


def test_a_forward_that_raises_fails_only_the_requests_of_that_step(rig: Rig) -> None:
    broken, beside = rig.submit([BOOM, 1]), rig.submit(PROMPT)
    loading = rig.submit(PROMPT, "t0")
    rig.step()
    for request_id in (broken, beside):
        assert isinstance(rig.error(request_id), StepFailed)
    later = rig.submit(PROMPT)
    rig.finish_all()
    for request_id in (loading, later):
        assert rig.tokens(request_id) == rig.expected(request_id)
    rig.assert_empty()


def test_a_step_that_finds_no_memory_leaves_the_server_running(tmp_path: Path) -> None:
    rig = Rig(tmp_path, asynchronous=True)
    rig.runner.failure = torch.OutOfMemoryError("CUDA out of memory")
    broken = rig.submit([BOOM, 1])
    rig.step()
    assert isinstance(rig.error(broken), StepFailed)
    later = rig.submit(PROMPT)
    rig.finish_all()
    assert rig.tokens(later) == rig.expected(later)
    rig.assert_empty()


@pytest.mark.parametrize("by_load", [False, True])
def test_a_device_that_is_broken_ends_the_engine(tmp_path: Path, by_load: bool) -> None:
    """Whether a step or a copy of a prefix found it: its requests may go to another replica."""
    rig = Rig(tmp_path, asynchronous=True)
    if by_load:
        rig.world.store.errors[rig.world.versions[0].sha256] = Unavailable("AcceleratorError")
        request_id = rig.submit(PROMPT, "t0")
        rig.step()
        rig.world.settle_jobs()
    else:
        request_id = rig.submit([BOOM, 1])
    rig.runner.broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        rig.step()
    rig.engine.close(EngineDead("the engine has stopped"))
    assert isinstance(rig.error(request_id), EngineDead)
    assert rig.world.allocator.num_used == 0


def test_logits_that_are_not_finite_fail_only_their_request(rig: Rig) -> None:
    broken, beside = rig.submit([NAN, 1]), rig.submit(PROMPT)
    rig.finish_all()
    error = rig.error(broken)
    assert isinstance(error, StepFailed)
    assert "finite" in str(error)
    assert rig.tokens(beside) == rig.expected(beside)


def test_a_load_that_fails_fails_only_the_requests_of_its_prefix(rig: Rig) -> None:
    rig.world.store.errors[rig.world.versions[0].sha256] = CorruptBlob("damaged")
    broken, beside = rig.submit(PROMPT, "t0"), rig.submit(PROMPT, "t1")
    rig.finish_all()
    assert isinstance(rig.error(broken), CorruptBlob)
    assert rig.tokens(beside) == rig.expected(beside)


# --- deadlines ------------------------------------------------------------------------------------


def test_a_deadline_ends_a_running_request_after_what_it_has_said(rig: Rig) -> None:
    request_id = rig.submit(PROMPT, deadline=10.0, max_new_tokens=30, ignore_eos=True)
    rig.step()
    rig.now = 9.99
    rig.step()
    rig.now = 10.0
    rig.step()
    error = rig.error(request_id)
    assert isinstance(error, DeadlineExceeded)
    assert error.param == "parameters.timeout_s"
    assert len(rig.tokens(request_id)) == 2
    rig.assert_empty()


def test_a_deadline_that_passes_while_the_prefix_loads_says_unavailable(rig: Rig) -> None:
    request_id = rig.submit(PROMPT, "t0", deadline=10.0)
    rig.step()
    assert rig.world.state(rig.world.versions[0]) is PrefixState.LOADING
    rig.now = 11.0
    rig.step()
    error = rig.error(request_id)
    assert isinstance(error, Unavailable)
    assert "t0@1" in str(error)
    rig.assert_empty()


def test_a_deadline_that_passes_in_the_queue_with_the_prefix_there(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_num_seqs=1)
    rig.submit(PROMPT, "t0", max_new_tokens=30, ignore_eos=True)
    rig.step()
    rig.world.settle_jobs()
    rig.step()
    rig.world.settle_jobs()
    assert rig.step()
    queued = rig.submit(PROMPT, "t0", deadline=5.0)
    rig.step()
    rig.now = 6.0
    rig.step()
    assert isinstance(rig.error(queued), DeadlineExceeded)
    rig.finish_all()


# --- the end --------------------------------------------------------------------------------------


def test_close_ends_every_request_received_or_not_and_gives_everything_back(rig: Rig) -> None:
    done = rig.submit(PROMPT, max_new_tokens=1)
    running, loading = rig.submit(PROMPT, max_new_tokens=30), rig.submit(PROMPT, "t0")
    rig.step()
    unread = rig.submit(PROMPT, "t1")
    rig.abort(running)
    rig.engine.close(EngineDead("over"))
    assert rig.finish(done).error is None
    for request_id in (running, loading, unread):
        assert isinstance(rig.error(request_id), EngineDead)
    assert rig.world.allocator.num_used == 0


def test_close_answers_even_if_a_request_cannot_be_given_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [rig.submit(PROMPT, task) for task in ("t0", "t1", None)]
    rig.step()

    def broken(key: object) -> None:
        raise AssertionError("a bug in residency")

    monkeypatch.setattr(rig.world.residency, "unpin", broken)
    rig.engine.close(EngineDead("over"))
    for request_id in ids:
        assert isinstance(rig.error(request_id), EngineDead)


def test_every_error_of_the_engine_is_in_the_exception_tree() -> None:
    assert issubclass(StepFailed, PrefixdError)
    assert StepFailed.code == "internal_error"
