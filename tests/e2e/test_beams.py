"""Beam search gives transformers' tokens and scores on PEFT's prefixes, whatever is in the batch.

The oracle is ``PeftModel.generate`` with a batch of one. Prefixes are saved by PEFT itself.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from prefixd import Client
from prefixd_server.config import ModelConfig
from prefixd_server.errors import InvalidRequest
from prefixd_server.kv.allocator import pages_for
from prefixd_server.models.loader import LoadedModel, load_model
from prefixd_server.types import BeamParams, FinishReason
from tests.support.engine import EngineRun, request
from tests.support.models import Reference, load_base, save_peft_prefix, tiny_model_folder
from tests.support.server import LiveServer

TOLERANCE = 1e-4
LENGTHS = (1, 20, 130)
SEARCHES: tuple[tuple[int, float, Any], ...] = (
    (2, 1.0, False),
    (4, 0.8, False),
    (5, 2.0, True),
    (6, 1.0, "never"),
    (4, 2.0, "never"),
    (5, 0.8, True),
)
"""num_beams, length_penalty, early_stopping"""


@dataclass(frozen=True)
class Search:
    request_id: str
    task: str | None
    prompt: list[int]
    max_new_tokens: int
    beams: BeamParams
    stop_token_ids: frozenset[int]
    expected: list[tuple[list[int], float]]


@dataclass(frozen=True)
class Plain:
    request_id: str
    task: str | None
    prompt: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class World:
    model: LoadedModel
    reference: Reference
    prefixes: dict[str, Path]
    searches: list[Search]
    plain: list[Plain]

    @property
    def eos(self) -> int:
        (eos,) = self.model.eos_token_ids
        return eos


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp(request.param)
    folder = tiny_model_folder(request.param, root / "model")
    base = load_base(folder)
    prefixes = {
        f"p{count}": save_peft_prefix(
            base, root / f"p{count}", num_virtual_tokens=count, seed=count
        )
        for count in LENGTHS
    }
    reference = Reference(folder)
    model = load_model(ModelConfig(model=str(folder)))
    rng = random.Random(request.param)
    searches = []
    for i, (num_beams, length_penalty, early_stopping) in enumerate(SEARCHES * 2):
        task = [*prefixes, None][i % 4]
        prefix = prefixes[task] if task else None
        prompt = [rng.randrange(10, 40_000) for _ in range(rng.choice([1, 5, 16, 17, 60]))]
        count = rng.randint(6, 24)
        # A random model hardly ever ends by itself: half of the searches are told to stop at
        # tokens that come up in greedy decoding.
        greedy = reference.generate(prefix, prompt, count)[0] if i % 2 else []
        stops = frozenset(greedy[2:6:2])
        n = 1 + i % num_beams
        searches.append(
            Search(
                f"search{i}",
                task,
                prompt,
                count,
                BeamParams(num_beams, n, length_penalty, early_stopping),
                stops,
                reference.search(
                    prefix,
                    prompt,
                    eos_token_id=[*model.eos_token_ids, *stops],
                    max_new_tokens=count,
                    num_beams=num_beams,
                    num_return_sequences=n,
                    length_penalty=length_penalty,
                    early_stopping=early_stopping,
                ),
            )
        )
    plain = []
    for i, task in enumerate([*prefixes, None] * 2):
        prompt = [rng.randrange(10, 40_000) for _ in range(rng.randint(1, 30))]
        tokens = reference.generate(prefixes[task] if task else None, prompt, 12)[0]
        plain.append(Plain(f"plain{i}", task, prompt, tokens))
    return World(model, reference, prefixes, searches, plain)


def start(world: World, tmp_path: Path, **options: Any) -> EngineRun:
    run = EngineRun(world.model, tmp_path / "store", **options)
    for task, checkpoint in world.prefixes.items():
        run.publish(task, checkpoint, tmp_path)
    return run


def submit(run: EngineRun, search: Search, **sampling: Any) -> None:
    run.submit(
        [
            request(
                search.request_id,
                search.task,
                search.prompt,
                max_new_tokens=search.max_new_tokens,
                stop_token_ids=search.stop_token_ids,
                beams=search.beams,
                **sampling,
            )
        ]
    )


def check(run: EngineRun, world: World, search: Search) -> None:
    result = run.results[search.request_id]
    found = result.finish.hypotheses
    assert result.tokens == []
    assert [[token.id for token in h.tokens] for h in found] == [ids for ids, _ in search.expected]
    assert [h.score for h in found] == pytest.approx(
        [score for _, score in search.expected], abs=TOLERANCE
    )
    assert result.finish.reason is found[0].reason
    for hypothesis in found:
        last = hypothesis.tokens[-1].id
        if last == world.eos:
            assert hypothesis.reason is FinishReason.EOS
        elif last in search.stop_token_ids:
            assert hypothesis.reason is FinishReason.STOP
        else:
            assert hypothesis.reason is FinishReason.LENGTH
            assert len(hypothesis.tokens) == search.max_new_tokens
        total = sum(token.logprob for token in hypothesis.tokens)
        mean = total / len(hypothesis.tokens) ** search.beams.length_penalty
        assert hypothesis.score == pytest.approx(mean, abs=TOLERANCE)


def test_some_searches_end_early_and_some_do_not(world: World) -> None:
    lengths = [
        (len(tokens), search.max_new_tokens)
        for search in world.searches
        for tokens, _ in search.expected
    ]
    assert any(length < longest for length, longest in lengths)
    assert any(length == longest for length, longest in lengths)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="mixed"),
        pytest.param({"max_num_batched_tokens": 24, "page_size": 4}, id="chunked"),
        pytest.param({"max_num_seqs": 9, "page_size": 1}, id="few-seats"),
        pytest.param({"attention": "sdpa"}, id="sdpa"),
    ],
)
def test_searches_mixed_with_greedy_and_sampled_requests(
    world: World, tmp_path: Path, options: dict[str, Any]
) -> None:
    with start(world, tmp_path, **options) as run:
        for i, search in enumerate(world.searches):
            submit(run, search)
            plain = world.plain[i % len(world.plain)]
            run.submit([request(f"greedy{i}", plain.task, plain.prompt, max_new_tokens=12)])
            drawn = {"max_new_tokens": 12, "temperature": 0.9, "seed": i % len(world.plain)}
            run.submit([request(f"drawn{i}", plain.task, plain.prompt, **drawn)])
            run.step()
        run.run()
        for search in world.searches:
            check(run, world, search)
        for i in range(len(world.searches)):
            assert run.results[f"greedy{i}"].ids == world.plain[i % len(world.plain)].tokens
        for i in range(len(world.plain), len(world.searches)):
            again = run.results[f"drawn{i % len(world.plain)}"].ids
            assert run.results[f"drawn{i}"].ids == again, "the same seed, in another batch"


@pytest.mark.parametrize("page_size", [2, 16])
def test_preempted_searches_find_the_same(world: World, tmp_path: Path, page_size: int) -> None:
    """Every few steps all free memory is gone for a moment: whoever needs some is thrown out."""
    num_pages = 1000 // page_size
    thrown_out = set()
    with start(world, tmp_path, page_size=page_size, num_pages=num_pages) as run:
        for search in world.searches:
            submit(run, search)
        run.step()
        steps = 0
        while run.engine.has_work:
            steps += 1
            taken = run.allocator.allocate(run.allocator.num_free if steps % 6 == 0 else 0)
            assert taken is not None
            if not run.engine.step():
                run.server.mailbox.wait(0.01)
            run.allocator.release(taken)
            run.engine.check()
            for sequence in run.engine.scheduler.waiting:
                if sequence.beam_group and sequence.beam_group.outputs:
                    thrown_out.add((sequence.request_id, len(sequence.beam_group.outputs[0])))
        for search in world.searches:
            check(run, world, search)
    assert len(thrown_out) > 4


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_beams_share_their_prompts_pages(world: World, tmp_path: Path, page_size: int) -> None:
    """Six beams over 403 tokens take what one takes, and a few pages each for what they add."""
    prompt = [7 + i % 90 for i in range(403)]
    new, k = 20, 6
    beams = BeamParams(k, k, 1.0, "never")
    with start(world, tmp_path, page_size=page_size) as run:
        sampling = {"max_new_tokens": new, "beams": beams, "ignore_eos": True}
        run.submit([request("r", "p20", prompt, **sampling)])
        most = 0
        run.step()
        while run.engine.has_work:
            if not run.step():
                run.server.mailbox.wait(0.01)
            most = max(most, run.allocator.num_used)
        shared = pages_for(20, page_size) + len(prompt) // page_size
        grown = pages_for(len(prompt) + new, page_size) - len(prompt) // page_size
        assert most <= shared + k * grown
        assert most < 2 * pages_for(20 + len(prompt) + new, page_size)
        assert len(run.results["r"].finish.hypotheses) == k


def test_penalties_move_log_probabilities_as_in_transformers(world: World, tmp_path: Path) -> None:
    """transformers hands log-probabilities, not logits, to its processors in a beam search. The
    bias makes three tokens come again and again, one of which is a stop token."""
    prompt, stop, bias = [7, 50, 9, 51], 9, {7: 14.0, 8: 14.0, 9: 14.0}
    given = {"max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 4}
    biased = {"sequence_bias": {(token,): value for token, value in bias.items()}, **given}
    moved = {"repetition_penalty": 1.3, "min_new_tokens": 5, **biased}
    plain, expected = (
        world.reference.search(world.prefixes["p20"], prompt, eos_token_id=[world.eos, stop], **o)
        for o in (biased, moved)
    )
    assert [ids for ids, _ in plain] != [ids for ids, _ in expected]
    assert all(len(ids) > 5 and set(ids) & set(bias) for ids, _ in expected)
    with start(world, tmp_path) as run:
        sampling = {
            "max_new_tokens": 12,
            "min_new_tokens": 5,
            "repetition_penalty": 1.3,
            "logit_bias": tuple(bias.items()),
            "stop_token_ids": frozenset({stop}),
            "beams": BeamParams(4, 4),
        }
        run.submit([request("r", "p20", prompt, **sampling)])
        run.run()
        found = run.results["r"].finish.hypotheses
    assert [[token.id for token in h.tokens] for h in found] == [ids for ids, _ in expected]
    assert [h.score for h in found] == pytest.approx([s for _, s in expected], abs=TOLERANCE)


def test_a_search_is_refused_where_it_can_never_fit(world: World, tmp_path: Path) -> None:
    with start(world, tmp_path, num_pages=40, page_size=4, max_num_seqs=4) as run:
        run.submit([request("wide", None, [5, 6], beams=BeamParams(5))])
        long = {"max_new_tokens": 48, "beams": BeamParams(4)}
        run.submit([request("long", None, [5, 6], **long)])
        run.submit([request("fits", None, [5, 6], **{**long, "max_new_tokens": 38})])
        run.run()
        wide, long_ = run.results["wide"].finish.error, run.results["long"].finish.error
        assert isinstance(wide, InvalidRequest)
        assert (wide.param, str(wide)) == (
            "parameters.num_beams",
            "num_beams is 5; the server's max_num_seqs is 4",
        )
        assert isinstance(long_, InvalidRequest)
        assert "needs 52 pages" in str(long_)
        assert "has 40" in str(long_)
        assert run.results["fits"].finish.hypotheses


def test_over_http_it_is_the_text_of_the_hypotheses(tmp_path: Path) -> None:
    """The whole way round: client, server, engine, against transformers on the same text."""
    folder = tiny_model_folder("llama", tmp_path / "model")
    prefix = save_peft_prefix(load_base(folder), tmp_path / "p", num_virtual_tokens=7, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = "name : Blue Spice"
    with LiveServer(folder, str(tmp_path / "store")) as server, Client(server.url) as client:
        client.push("t", prefix)
        options = {"max_new_tokens": 8, "num_beams": 4, "length_penalty": 0.8}
        answer = client.generate("t", prompt, n=3, details=True, early_stopping=True, **options)
        (eos,) = server.server.model.eos_token_ids
    expected = Reference(folder).search(
        prefix,
        tokenizer(prompt)["input_ids"],
        eos_token_id=[eos],
        num_return_sequences=3,
        early_stopping=True,
        **options,
    )
    assert answer.sequences is not None
    assert answer.score == answer.sequences[0].score
    assert [
        [token.id for token in sequence.details.tokens]
        for sequence in answer.sequences
        if sequence.details
    ] == [ids for ids, _ in expected]
    assert [sequence.score for sequence in answer.sequences] == pytest.approx(
        [score for _, score in expected], abs=TOLERANCE
    )
    assert answer.generated_text == answer.sequences[0].generated_text != ""
