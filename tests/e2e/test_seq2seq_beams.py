"""Beam search on encoder-decoders: the hypotheses and scores of transformers' ``generate``.

Searches of different tasks and widths share steps with greedy requests; beams share the pages of
cross-attention's KV, which are there once for each request.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from prefixd_server.config import ModelConfig
from prefixd_server.kv.allocator import pages_for
from prefixd_server.models.loader import load_model
from prefixd_server.types import BeamParams
from tests.support.engine import EngineRun, request
from tests.support.seq2seq import (
    FAMILIES,
    Seq2SeqReference,
    publish,
    random_prefix,
    tiny_seq2seq_folder,
)

TASKS: dict[str, tuple[str, ...]] = {
    "all": ("encoder", "decoder", "cross"),
    "decoder": ("decoder",),
    "cross": ("cross",),
}
SEARCHES: tuple[tuple[int, float, Any], ...] = ((2, 1.0, False), (5, 0.8, True), (6, 2.0, "never"))
"""num_beams, length_penalty, early_stopping"""
MAX_NEW_TOKENS = 12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_pages", [2000, 72], ids=["roomy", "tight"])
def test_searches_of_many_tasks_in_one_batch(family: str, num_pages: int, tmp_path: Path) -> None:
    folder = tiny_seq2seq_folder(family, tmp_path / "model")
    reference = Seq2SeqReference(folder)
    prefixes = {
        task: random_prefix(reference.model, dict.fromkeys(sites, 9), seed=i)
        for i, (task, sites) in enumerate(TASKS.items())
    }
    rng = random.Random(family)
    with EngineRun(
        load_model(ModelConfig(model=str(folder))),
        tmp_path / "store",
        page_size=4,
        num_pages=num_pages,
    ) as run:
        for task, prefix in prefixes.items():
            publish(run, task, prefix, tmp_path)
        expected = {}
        for i, task in enumerate([None, *TASKS, *TASKS]):
            text = [rng.randrange(10, 40_000) for _ in range(rng.choice([1, 6, 17]))]
            prefix = prefixes[task] if task else {}
            num_beams, length_penalty, early_stopping = SEARCHES[i % len(SEARCHES)]
            options = {
                "num_beams": num_beams,
                "length_penalty": length_penalty,
                "early_stopping": early_stopping,
            }
            expected[f"b{i}"] = reference.search(
                prefix, text, MAX_NEW_TOKENS, num_return_sequences=2, **options
            )
            expected[f"g{i}"] = [(reference.generate(prefix, text, MAX_NEW_TOKENS)[0], 0.0)]
            beams = BeamParams(**options, n=2)
            run.submit(
                [
                    request(f"b{i}", task, text, max_new_tokens=MAX_NEW_TOKENS, beams=beams),
                    request(f"g{i}", task, text, max_new_tokens=MAX_NEW_TOKENS),
                ]
            )
        run.run()
        assert num_pages > 100 or run.engine.scheduler.num_preemptions > 0
        for request_id, hypotheses in expected.items():
            result = run.results[request_id]
            if request_id.startswith("g"):
                assert result.ids == hypotheses[0][0]
                continue
            got = result.finish.hypotheses
            assert [[token.id for token in h.tokens] for h in got] == [ids for ids, _ in hypotheses]
            assert [h.score for h in got] == pytest.approx(
                [score for _, score in hypotheses], abs=1e-4
            )


def test_beams_share_one_copy_of_the_cross_pages(tmp_path: Path) -> None:
    folder = tiny_seq2seq_folder("bart", tmp_path / "model")
    text = list(range(50, 250))
    with EngineRun(load_model(ModelConfig(model=str(folder))), tmp_path / "store") as run:
        beams = BeamParams(num_beams=6)
        run.submit([request("b", None, text, max_new_tokens=10, beams=beams, ignore_eos=True)])
        for _ in range(5):
            run.step()
        size = run.allocator.page_size
        assert run.engine.num_running == 1
        # Six beams of fewer tokens than a page hold a page each, beside the text's own.
        assert pages_for(len(text), size) < run.allocator.num_used <= pages_for(200, size) + 6
        run.run()
