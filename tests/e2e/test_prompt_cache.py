"""Prompts that begin alike are computed once, and every token is still PEFT's.

The oracle is ``PeftModel.generate`` with a batch of one. Prefixes are saved by PEFT itself.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from prefixd_server.config import ModelConfig
from prefixd_server.kv.allocator import pages_for
from prefixd_server.models.loader import LoadedModel, load_model
from prefixd_server.types import BeamParams, FinishReason
from prefixd_store.importers import import_checkpoint
from tests.support.engine import EngineRun, request
from tests.support.models import Reference, load_base, save_peft_prefix, tiny_model_folder

TOLERANCE = 1e-4
LENGTHS = (1, 20, 33)
NUM_REQUESTS = 28


@dataclass(frozen=True)
class Case:
    request_id: str
    task: str | None
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class World:
    """Requests to three tasks and the base model; their prompts begin in one of four ways."""

    model: LoadedModel
    reference: Reference
    prefixes: dict[str, Path]
    cases: list[Case]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp(request.param)
    folder = tiny_model_folder(request.param, root / "model")
    base = load_base(folder)
    prefixes = {
        f"p{n}": save_peft_prefix(base, root / f"p{n}", num_virtual_tokens=n, seed=n)
        for n in LENGTHS
    }
    reference = Reference(folder)
    rng = random.Random(request.param)
    heads = [[rng.randrange(10, 40_000) for _ in range(n)] for n in (16, 37, 64, 90)]
    cases = []
    for i in range(NUM_REQUESTS):
        task = rng.choice([None, *prefixes])
        tail = [rng.randrange(10, 40_000) for _ in range(rng.choice([0, 1, 5, 16, 20]))]
        prompt = rng.choice(heads) + tail
        prefix = prefixes[task] if task else None
        tokens, logprobs = reference.generate(prefix, prompt, rng.randint(1, 20))
        cases.append(Case(f"r{i}", task, prompt, tokens, logprobs))
    return World(load_model(ModelConfig(model=str(folder))), reference, prefixes, cases)


def start(world: World, tmp_path: Path, **options: int) -> EngineRun:
    run = EngineRun(world.model, tmp_path / "store", **options)
    for task, checkpoint in world.prefixes.items():
        run.publish(task, checkpoint, tmp_path)
    return run


def submit(run: EngineRun, case: Case) -> None:
    run.submit([request(case.request_id, case.task, case.prompt, max_new_tokens=len(case.tokens))])


def check(run: EngineRun, case: Case) -> None:
    result = run.results[case.request_id]
    assert result.finish.reason in (FinishReason.LENGTH, FinishReason.EOS), result.finish
    assert result.ids == case.tokens, case
    got = [token.logprob for token in result.tokens]
    assert got == pytest.approx(case.logprobs, abs=TOLERANCE)


def num_hits(run: EngineRun) -> int:
    return run.engine.scheduler.prompt_cache.num_hit_tokens


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="mixed"),
        pytest.param(
            {"max_num_batched_tokens": 24, "page_size": 4, "num_pages": 600}, id="chunked"
        ),
        pytest.param({"page_size": 1, "num_pages": 500}, id="pages-of-one"),
    ],
)
def test_prompts_with_heads_in_common_get_pefts_tokens(
    world: World, tmp_path: Path, options: dict[str, int]
) -> None:
    rng = random.Random(1)
    waiting = list(world.cases)
    with start(world, tmp_path, **options) as run:
        while waiting:
            for _ in range(rng.randint(0, 4)):
                if waiting:
                    submit(run, waiting.pop())
            run.step()
        run.run()
        for case in world.cases:
            check(run, case)
        cache = run.engine.scheduler.prompt_cache
        assert cache.num_queried_tokens == sum(len(case.prompt) for case in world.cases)
        assert num_hits(run) > cache.num_queried_tokens / 10


def test_evicted_and_preempted(world: World, tmp_path: Path) -> None:
    """Few pages, and every few steps they are all gone for a moment: who needs one is thrown out,
    and what was cached is lost."""
    with start(world, tmp_path, num_pages=120, page_size=4, max_num_seqs=16) as run:
        for case in world.cases:
            submit(run, case)
        steps = 0
        run.step()
        while run.engine.has_work:
            steps += 1
            taken = run.allocator.allocate(run.allocator.num_free if steps % 9 == 0 else 0)
            assert taken is not None
            if not run.engine.step():
                run.server.mailbox.wait(0.01)
            run.allocator.release(taken)
            run.engine.check()
        for case in world.cases:
            check(run, case)
        assert run.engine.scheduler.num_preemptions > 0
        assert run.engine.scheduler.prompt_cache.pages.num_evictions > 0
        assert num_hits(run) > 0


def test_a_conversation_computes_only_what_is_new(world: World, tmp_path: Path) -> None:
    rng = random.Random(2)
    prompt = [rng.randrange(10, 40_000) for _ in range(50)]
    with start(world, tmp_path) as run:
        for turn in range(4):
            expected, _ = world.reference.generate(world.prefixes["p20"], prompt, 20)
            before = num_hits(run)
            run.submit([request(f"turn{turn}", "p20", prompt, max_new_tokens=20)])
            run.run()
            assert run.results[f"turn{turn}"].ids == expected
            if turn:
                known = len(prompt) - 7 - 1  # all but the question, and the answer's last token
                assert num_hits(run) - before == known // 16 * 16
            prompt = prompt + expected + [rng.randrange(10, 40_000) for _ in range(7)]


def test_searches_and_greedy_requests_share_prompts(world: World, tmp_path: Path) -> None:
    prompt = [7 + i % 90 for i in range(40)]
    prefix = world.prefixes["p33"]
    (eos,) = world.model.eos_token_ids
    expected = world.reference.search(
        prefix,
        prompt,
        eos_token_id=[eos],
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=12,
    )
    greedy, _ = world.reference.generate(prefix, prompt, 12)
    with start(world, tmp_path, page_size=4) as run:
        for turn in range(3):
            run.submit(
                [
                    request(
                        f"search{turn}", "p33", prompt, max_new_tokens=12, beams=BeamParams(4, 4)
                    ),
                    request(f"greedy{turn}", "p33", prompt, max_new_tokens=12),
                ]
            )
            run.run()
            assert run.results[f"greedy{turn}"].ids == greedy
            found = run.results[f"search{turn}"].finish.hypotheses
            assert [[token.id for token in h.tokens] for h in found] == [t for t, _ in expected]
            scores = [score for _, score in expected]
            assert [h.score for h in found] == pytest.approx(scores, abs=TOLERANCE)
        assert num_hits(run) >= 4 * 36


def test_two_tenants_with_equal_prompts_share_no_page(world: World, tmp_path: Path) -> None:
    prompt = [7 + i % 90 for i in range(64)]
    with start(world, tmp_path) as run:
        files = {path.name: path for path in world.prefixes["p20"].iterdir() if path.is_file()}
        blob = tmp_path / "other.safetensors"
        found = import_checkpoint(files, blob, geometry=run.server.model.geometry)
        version = found.manifest.version_record(found.sha256, found.bytes)
        run.server.registry.publish("other", "p20", blob, version)
        for task in ("p20", None):
            expected, _ = world.reference.generate(task and world.prefixes[task], prompt, 8)
            mine = request(f"mine-{task}", task, prompt, max_new_tokens=8)
            theirs = replace(mine, request_id=f"theirs-{task}", tenant="other")
            run.submit([mine])
            run.run()
            before = num_hits(run)
            run.submit([theirs])
            run.run()
            assert num_hits(run) == before
            run.submit([replace(mine, request_id=f"mine-again-{task}")])
            run.submit([replace(theirs, request_id=f"theirs-again-{task}")])
            run.step()
            first, second = (set(s.pages) for s in run.engine.scheduler.running)
            assert not first & second
            prefix_pages = sum(len(pages) for pages in run.server.residency.owned_pages())
            assert run.allocator.num_used - prefix_pages == 2 * pages_for(len(prompt), 16)
            run.run()
            assert num_hits(run) == before + 2 * 48
            for who in ("mine", "theirs", "mine-again", "theirs-again"):
                assert run.results[f"{who}-{task}"].ids == expected


def test_a_swapped_version_finds_nothing_of_the_old_one(world: World, tmp_path: Path) -> None:
    prompt = [7 + i % 90 for i in range(64)]
    expected = {n: world.reference.generate(world.prefixes[f"p{n}"], prompt, 12) for n in LENGTHS}
    with start(world, tmp_path) as run:
        hits = []
        # The same content under another name of the tenant's, then again as the third version.
        for turn, n in enumerate((20, 33, 20)):
            run.publish("swapped", world.prefixes[f"p{n}"], tmp_path)
            before = num_hits(run)
            for i in range(2):
                run.submit([request(f"r{turn}-{i}", "swapped", prompt, max_new_tokens=12)])
                run.run()
                assert run.results[f"r{turn}-{i}"].ids == expected[n][0]
            hits.append(num_hits(run) - before)
        assert hits == [48, 48, 96]


def test_a_hundred_requests_in_few_pages_as_with_the_cache_off(
    world: World, tmp_path: Path
) -> None:
    rng = random.Random(3)
    heads = [[rng.randrange(10, 40_000) for _ in range(n)] for n in (8, 30)]
    requests = [
        request(
            f"r{i}",
            rng.choice([None, "p1", "p20"]),
            [*rng.choice(heads), *(rng.randrange(10, 13) for _ in range(rng.randrange(6)))],
            max_new_tokens=rng.randint(1, 12),
            temperature=rng.choice([0.0, 0.8]),
            seed=i,
        )
        for i in range(100)
    ]
    answers = []
    for prompt_cache in (True, False):
        options = {"num_pages": 60, "page_size": 2, "max_num_seqs": 24}
        folder = tmp_path / str(prompt_cache)
        with start(world, folder, prompt_cache=prompt_cache, **options) as run:
            run.submit(requests)
            run.run()
            answers.append({id_: result.ids for id_, result in run.results.items()})
            assert run.engine.scheduler.num_preemptions > 0
            assert (num_hits(run) > 0) == prompt_cache
    assert answers[0] == answers[1]
