"""From a file to a server over HTTP: a text of the data gets the trainer's log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixd import Client, Token
from prefixd_train.data import Encoder, Example, read_examples
from prefixd_train.initialise import from_prefix_file
from prefixd_train.inject import target_logits
from prefixd_train.lm import FrozenLM, load_lm
from prefixd_train.options import TrainOptions
from prefixd_train.template import PromptTemplate
from prefixd_train.train import train
from tests.support.models import tiny_model_folder
from tests.support.server import LiveServer
from tests.support.training import batch_of
from tests.train.conftest import ROWS

TOLERANCE = 1e-4
TEMPLATE = "Data: {source} =>\n"
DEV = [
    {"source": "name: Bäckerei Öz | food: 寿司", "target": "Bäckerei Öz has 寿司; it's good."},
    {"source": "name:  The  Mill | food: Thai", "target": "The Mill – a Thai place 🍜."},
]
"""whose tokens are not just words after single spaces"""


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@torch.no_grad()
def logprobs(lm: FrozenLM, prefix: Path, example: Example) -> list[float]:
    """The trainer's, of each token of the target."""
    kv = from_prefix_file(lm, prefix)
    found = target_logits(lm, batch_of(lm, [example.source], [example.target]), kv)
    chosen = torch.log_softmax(found.logits, -1).gather(1, found.targets[:, None])
    return [float(value) for value in chosen[:, 0]]


def read_by_the_server(client: Client, task: str, text: str) -> tuple[list[Token], list[Token]]:
    """The prompt's tokens, and those that follow greedily."""
    details = client.generate(
        task, text, max_new_tokens=5, details=True, decoder_input_details=True
    ).details
    assert details is not None
    return details.prefill, details.tokens


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_row_over_http_has_the_trainers_log_probabilities(family: str, tmp_path: Path) -> None:
    model = tiny_model_folder(family, tmp_path / "model")
    dev = write(tmp_path / "dev.jsonl", DEV)
    with LiveServer(model, str(tmp_path / "store")) as server, server.client() as client:
        options = TrainOptions(
            model=str(model),
            data=write(tmp_path / "train.jsonl", ROWS),
            dev=dev,
            task="e2e",
            out=tmp_path / "run",
            push=server.url,
            prompt_template=TEMPLATE,
            num_virtual_tokens=4,
            parameterisation="mlp",
            max_steps=6,
            device="cpu",
        )
        trained = train(options)
        assert trained is not None
        lm = load_lm(str(model))
        encoder = Encoder(lm.tokenizer, PromptTemplate(TEMPLATE), is_encoder_decoder=False)
        examples = read_examples(dev, encoder)
        counted: list[float] = []
        for index, row in enumerate(DEV):
            source, target = map(list, examples[index])
            prompt = TEMPLATE.format(**row)
            # As clients ask: the prompt's text, and what is generated after it.
            prefill, written = read_by_the_server(client, "e2e", prompt)
            assert [token.id for token in prefill] == source
            answer = Example(source, [token.id for token in written])
            expected = logprobs(lm, trained.prefix, answer)
            assert [token.logprob for token in written] == pytest.approx(expected, abs=TOLERANCE)
            # The row's own target, read by the server as a text with the end that training has.
            whole = prompt + row["target"] + lm.tokenizer.eos_token
            prefill, _ = read_by_the_server(client, "e2e", whole)
            assert [token.id for token in prefill] == [*source, *target]
            served = [token.logprob for token in prefill[len(source) :]]
            expected = logprobs(lm, trained.prefix, Example(source, target))
            assert served == pytest.approx(expected, abs=TOLERANCE)
            counted += [logprob for logprob in served if logprob is not None]
        # It is what the run said of its dev set.
        assert -sum(counted) / len(counted) == pytest.approx(
            trained.validation.best_loss, abs=TOLERANCE
        )
