"""Beam search of encoder-decoders: transformers' tokens and scores, with prefixes at all sites."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from prefixd_server.config import ModelConfig
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

TOLERANCE = 1e-4
TASKS = {"encoder": ("encoder",), "cross": ("cross",), "all": ("encoder", "decoder", "cross")}
SEARCHES: tuple[tuple[int, float, Any], ...] = (
    (2, 1.0, False),
    (4, 0.8, True),
    (5, 2.0, "never"),
    (6, 1.0, False),
)
"""num_beams, length_penalty, early_stopping"""


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_and_preempted_searches_find_what_transformers_finds(
    family: str, tmp_path: Path
) -> None:
    """BART forces its first and last token, whose score is then zero; Marian bans one."""
    folder = tiny_seq2seq_folder(family, tmp_path / "model")
    reference = Seq2SeqReference(folder)
    prefixes = {
        task: random_prefix(reference.model, dict.fromkeys(sites, 20), seed=i)
        for i, (task, sites) in enumerate(TASKS.items())
    }
    rng = random.Random(family)
    model = load_model(ModelConfig(model=str(folder)))
    expected: dict[str, list[tuple[list[int], float]]] = {}
    greedy: dict[str, list[int]] = {}
    with EngineRun(model, tmp_path / "store", page_size=4, num_pages=200) as run:
        for task, prefix in prefixes.items():
            publish(run, task, prefix, tmp_path)
        for i, (num_beams, length_penalty, early_stopping) in enumerate(SEARCHES * 2):
            task = [*prefixes, None][i % 4]
            prefix = prefixes[task] if task else {}
            text = [rng.randrange(10, 40_000) for _ in range(rng.choice([1, 7, 33]))]
            new = rng.randint(4, 14)
            beams = BeamParams(num_beams, num_beams, length_penalty, early_stopping)
            expected[f"s{i}"] = reference.search(
                prefix,
                text,
                max_new_tokens=new,
                num_beams=num_beams,
                num_return_sequences=num_beams,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
            )
            greedy[f"g{i}"] = reference.generate(prefix, text, new)[0]
            run.submit([request(f"s{i}", task, text, max_new_tokens=new, beams=beams)])
            run.submit([request(f"g{i}", task, text, max_new_tokens=new)])
        preempted = 0
        run.step()
        steps = 0
        while run.engine.has_work:
            steps += 1
            # Every few steps all free memory is gone for a moment.
            taken = run.allocator.allocate(run.allocator.num_free if steps % 5 == 0 else 0)
            assert taken is not None
            if not run.engine.step():
                run.server.mailbox.wait(0.01)
            run.allocator.release(taken)
            run.engine.check()
            preempted += sum(
                bool(sequence.beam_group and sequence.beam_group.outputs)
                for sequence in run.engine.scheduler.waiting
            )
    assert preempted > 0
    for request_id, tokens in greedy.items():
        assert run.results[request_id].ids == tokens
    for request_id, hypotheses in expected.items():
        found = run.results[request_id].finish.hypotheses
        assert [[token.id for token in h.tokens] for h in found] == [ids for ids, _ in hypotheses]
        assert [h.score for h in found] == pytest.approx(
            [score for _, score in hypotheses], abs=TOLERANCE
        )
