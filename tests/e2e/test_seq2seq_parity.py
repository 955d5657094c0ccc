"""Encoder-decoders: tokens and log-probabilities equal transformers' own, mixed and preempted.

The oracle is ``generate`` of one text alone, with the prefix prepended to the keys and values of
its sites by a re-derivation in ``tests/support/seq2seq.py``; for PEFT's prefixes it is PEFT itself.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM

from prefixd_server.config import ModelConfig
from prefixd_server.kv.allocator import pages_for
from prefixd_server.models.loader import LoadedModel, load_model
from prefixd_server.types import FinishReason
from tests.support.engine import EngineRun, request
from tests.support.seq2seq import (
    FAMILIES,
    Prefix,
    Seq2SeqReference,
    publish,
    random_prefix,
    tiny_seq2seq_folder,
)

LENGTHS = (1, 20, 130)
SITES = {
    "encoder": ("encoder",),
    "decoder": ("decoder",),
    "cross": ("cross",),
    "all": ("encoder", "decoder", "cross"),
}
SEVERAL = {
    "several": {"encoder": 7, "decoder": 3, "cross": 21},
    "others": {"encoder": 40, "decoder": 130, "cross": 1},
    "two": {"encoder": 16, "cross": 33},
}
BEHIND = "behind"
"""several lengths, and each side of a T5 begins at its own"""
TEXT_LENGTHS = (1, 2, 7, 16, 17, 33, 150)
LONG_TASKS = (None, "all20", "decoder1", "cross20", None, "all20", "encoder20", "several")
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    request_id: str
    task: str | None
    text: list[int]
    max_new_tokens: int
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class World:
    """One model, a prefix for each of 4 sets of sites and 3 lengths, some with a length for each
    site, and what requests must get."""

    model: LoadedModel
    prefixes: dict[str, Prefix]
    cases: list[Case]
    long: list[Case]
    """of long outputs, for which memory runs short"""


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    family = request.param
    folder = tiny_seq2seq_folder(family, tmp_path_factory.mktemp(family))
    reference = Seq2SeqReference(folder)
    prefixes = {
        f"{name}{length}": random_prefix(reference.model, dict.fromkeys(sites, length), seed=i)
        for i, (name, sites) in enumerate(SITES.items())
        for length in LENGTHS
    }
    prefixes |= {name: random_prefix(reference.model, SEVERAL[name], seed=9) for name in SEVERAL}
    if family in ("t5", "mt5"):
        prefixes[BEHIND] = prefixes["several"]
    rng = random.Random(family)

    def case(request_id: str, task: str | None, text_length: int, count: int) -> Case:
        text = [rng.randrange(10, 40_000) for _ in range(text_length)]
        prefix = prefixes[task] if task else {}
        expected = reference.generate(prefix, text, count, behind=task == BEHIND)
        return Case(request_id, task, text, count, *expected)

    mixed = [
        # One token alone is the first and the last: what is forced at the end wins.
        case(f"r{i}", task, rng.choice(TEXT_LENGTHS), rng.randint(1, 16) if i else 1)
        for i, task in enumerate([None, *prefixes, None, *prefixes])
    ]
    long = [case(f"long{i}", task, 10, 36) for i, task in enumerate(LONG_TASKS)]
    return World(load_model(ModelConfig(model=str(folder))), prefixes, mixed, long)


def publish_all(run: EngineRun, world: World, scratch: Path) -> None:
    for task, prefix in world.prefixes.items():
        offset = SEVERAL["several"]["decoder"] if task == BEHIND else 0
        publish(run, task, prefix, scratch, query_offset=offset)


def assert_as_expected(run: EngineRun, cases: Sequence[Case]) -> None:
    for case in cases:
        result = run.results[case.request_id]
        assert result.finish.error is None
        assert result.ids == case.tokens, case
        assert [token.logprob for token in result.tokens] == pytest.approx(
            case.logprobs, abs=TOLERANCE
        )
        assert result.started is not None
        assert list(result.started.prompt_token_ids) == case.text
        ended = case.tokens[-1] in run.server.model.eos_token_ids
        assert result.finish.reason is (FinishReason.EOS if ended else FinishReason.LENGTH)


def submit(run: EngineRun, cases: Sequence[Case]) -> None:
    run.submit(
        request(case.request_id, case.task, case.text, max_new_tokens=case.max_new_tokens)
        for case in cases
    )


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_a_mixed_batch_equals_each_alone(
    world: World, tmp_path: Path, attention: Literal["auto", "sdpa"]
) -> None:
    with EngineRun(world.model, tmp_path / "store", attention=attention) as run:
        publish_all(run, world, tmp_path)
        submit(run, world.cases)
        run.run()
        assert_as_expected(run, world.cases)
        # Each prefix is there once, its sites in pages of their own.
        held = sum(len(pages) for pages in run.server.residency.owned_pages())
        assert held == sum(
            pages_for(keys.shape[2], 16)
            for prefix in world.prefixes.values()
            for keys, _ in prefix.values()
        )


def test_late_arrivals_join_what_runs(world: World, tmp_path: Path) -> None:
    """A budget smaller than some texts: their encoder runs whole all the same."""
    with EngineRun(
        world.model, tmp_path / "store", page_size=7, max_num_batched_tokens=40, max_num_seqs=9
    ) as run:
        publish_all(run, world, tmp_path)
        cases = world.cases[: len(world.cases) // 2]
        for case in cases:
            submit(run, [case])
            run.step()
        run.run()
        assert_as_expected(run, cases)


def test_preempted_sequences_compute_encoder_and_decoder_again(
    world: World, tmp_path: Path
) -> None:
    with EngineRun(world.model, tmp_path / "store", page_size=4, num_pages=75) as run:
        publish_all(run, world, tmp_path)
        submit(run, world.long)
        run.run()
        assert run.engine.scheduler.num_preemptions > 0
        assert_as_expected(run, world.long)


# --- PEFT ----------------------------------------------------------------------------------------

NUM_LAYERS = 3


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("t5", {"num_layers": NUM_LAYERS, "num_decoder_layers": NUM_LAYERS}),
        ("bart", {"encoder_layers": NUM_LAYERS, "decoder_layers": NUM_LAYERS}),
    ],
)
def test_prefixes_of_pefts_are_served_as_peft_serves_them(
    family: str, layers: dict[str, int], tmp_path: Path
) -> None:
    folder = tiny_seq2seq_folder(family, tmp_path / "model", **layers)
    rng = random.Random(family)
    cases: list[Case] = []
    for length in LENGTHS:
        torch.manual_seed(length)
        config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=length)
        base = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
        peft = get_peft_model(base, config).eval()
        peft.save_pretrained(tmp_path / f"p{length}")
        for text_length in (3, 40):
            text = [rng.randrange(10, 40_000) for _ in range(text_length)]
            output = peft.generate(
                input_ids=torch.tensor([text]),
                max_new_tokens=20,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
                output_logits=True,
            )
            tokens = output.sequences[0].tolist()[1:]
            logprobs = [
                torch.log_softmax(logits[0].float(), -1)[token].item()
                for logits, token in zip(output.logits, tokens, strict=True)
            ]
            cases.append(Case(f"r{len(cases)}", f"p{length}", text, 20, tokens, logprobs))
    assert len({tuple(case.tokens) for case in cases}) > 3
    with EngineRun(load_model(ModelConfig(model=str(folder))), tmp_path / "store") as run:
        for length in LENGTHS:
            run.publish(f"p{length}", tmp_path / f"p{length}", tmp_path)
        submit(run, cases)
        run.run()
        assert_as_expected(run, cases)
