"""What admission refuses, and what it makes of the rest; a refused request holds nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefixd_server.config import LimitsConfig
from prefixd_server.engine.admission import Admission
from prefixd_server.errors import InvalidRequest, NotFound, PrefixdError, PromptTooLong
from prefixd_server.prefix import Registry
from prefixd_server.types import EngineRequest, PrefixState, SamplingParams
from tests.prefix.support import TENANT, World, write_blob

MAX_MODEL_LEN = 32


class Desk:
    """Tasks t0 (5 virtual tokens), t1 (20) and ``compiled`` (4, which hold the BOS already)."""

    def __init__(self, root: Path) -> None:
        self.world = World(root, (5, 20), num_pages=6)
        self.registry = Registry(self.world.store, LimitsConfig())
        for version in self.world.versions:
            self.registry.get(TENANT, version.task)
        record = write_blob(self.world.blobs, 4, seed=9, source_format="compiled")
        self.registry.publish(TENANT, "compiled", self.world.blobs / record.sha256, record)
        self.admission = Admission(
            self.registry,
            self.world.residency,
            self.world.allocator,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=4,
            max_num_batched_tokens=16,
        )

    def request(
        self,
        prompt: int = 3,
        new: int = 2,
        task: str | None = None,
        version: int | None = None,
        leading_special_tokens: int = 0,
    ) -> EngineRequest:
        return EngineRequest(
            "r0",
            TENANT,
            task,
            version,
            tuple(range(prompt)),
            SamplingParams(max_new_tokens=new),
            float("inf"),
            leading_special_tokens,
        )


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_the_version_is_pinned_until_the_request_is_released(desk: Desk) -> None:
    sequence = desk.admission.admit(desk.request(task="t0"))
    version = desk.world.versions[0]
    assert sequence.prefix == version
    assert (sequence.prefix_len, sequence.position_offset) == (5, 5)
    assert desk.world.state(version) is PrefixState.LOADING, "its load starts at once"
    desk.world.residency.retire(version.key)
    desk.world.settle()
    assert desk.world.state(version) is PrefixState.RETIRING
    desk.admission.release(sequence)
    assert desk.world.state(version) is PrefixState.STORED


def test_the_base_model_has_no_prefix(desk: Desk) -> None:
    sequence = desk.admission.admit(desk.request())
    assert sequence.prefix is None
    assert (sequence.prefix_len, sequence.position_offset) == (0, 0)
    desk.admission.release(sequence)


@pytest.mark.parametrize(
    ("prompt", "leading", "kept"),
    [(4, 1, (1, 2, 3)), (4, 0, (0, 1, 2, 3)), (1, 1, (0,)), (2, 2, (1,))],
)
def test_a_prefix_that_starts_the_sequence_drops_leading_special_tokens(
    desk: Desk, prompt: int, leading: int, kept: tuple[int, ...]
) -> None:
    request = desk.request(prompt, task="compiled", leading_special_tokens=leading)
    assert desk.admission.admit(request).prompt_token_ids == kept
    plain = desk.request(prompt, task="t0", leading_special_tokens=leading)
    assert desk.admission.admit(plain).prompt_token_ids == tuple(range(prompt))


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        ({"task": "missing"}, NotFound, "missing"),
        ({"task": "t0", "version": 7}, NotFound, "7"),
        ({"prompt": 20, "new": 13}, PromptTooLong, "20 prompt .* 33; .* is 32"),
        ({"prompt": 20, "new": 10, "task": "t0"}, PromptTooLong, "5 virtual .* 35; .* is 32"),
        ({"prompt": 20, "new": 6}, InvalidRequest, "7 pages .* has 6"),
        ({"prompt": 3, "new": 2, "task": "t1"}, InvalidRequest, "7 pages .* has 6"),
    ],
)
def test_what_can_never_run_is_refused_and_nothing_is_pinned(
    desk: Desk, request_: dict[str, object], error: type[PrefixdError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        desk.admission.admit(desk.request(**request_))  # type: ignore[arg-type]
    assert type(caught.value) is error
    for version in desk.world.versions:
        assert desk.world.state(version) is PrefixState.STORED
    assert not desk.world.executor.jobs


def test_the_longest_that_fits_is_taken(desk: Desk) -> None:
    desk.admission.admit(desk.request(prompt=20, new=4))
    desk.admission.admit(desk.request(prompt=2, new=2, task="t1"))
