"""`prefixd evaluate` has the server read the tokens that training read, or refuses the rows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prefixd import AsyncClient
from prefixd_train.data import Encoder, read_examples
from prefixd_train.errors import DataError, TrainError
from prefixd_train.evaluate import EvaluateOptions, Evaluation, evaluate
from prefixd_train.template import PromptTemplate
from tests.support.models import TINY, demo_folder, save_random_model
from tests.support.server import LiveServer
from tests.train.conftest import ROWS, run

BOS = "<|endoftext|>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
ANSWER = {"role": "assistant", "content": "By the river."}
LONE = [[{"role": "user", "content": text}, ANSWER] for text in ("Is it open?", "Where, please?")]
LONGER = [[{"role": "system", "content": "Be short."}, *LONE[0]], [*LONE[0], *LONE[1]]]
DATA = {
    "lone": [{"messages": messages} for messages in LONE],
    "longer": [{"messages": messages} for messages in LONGER],
    "fields": ROWS[:2],
    "both": [{"messages": LONE[0]}, ROWS[0]],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer begins every text with a BOS, as Llama's, and its chat template does too."""
    plain: Any = AutoTokenizer.from_pretrained(demo_folder())
    backend = plain.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    config = TINY["llama"](len(tokenizer))
    return save_random_model(config, tokenizer, tmp_path_factory.mktemp("chats") / "model")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LiveServer]:
    """Each kind of rows has a task of its name, trained on them."""
    folder = model.parent
    with LiveServer(model, str(folder / "store")) as live:
        for name, rows in DATA.items():
            path = folder / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            settings = {
                "model": model,
                "data": path,
                "task": name,
                "out": folder / name,
                "push": live.url,
                "num-virtual-tokens": 3,
                "max-steps": 1,
                "device": "cpu",
            }
            assert run(["train", *(f"--{key}={value}" for key, value in settings.items())]) == 0
        yield live


def evaluated(server: LiveServer, task: str, rows: str, **options: Any) -> Evaluation:
    async def scored() -> Evaluation:
        parameters: Any = {"max_new_tokens": 1, "details": True, "decoder_input_details": True}
        path = Path(server.server.config.model.model).parent / f"{rows}.jsonl"
        async with AsyncClient(server.url, max_retries=0) as client:
            return await evaluate(
                client, EvaluateOptions(task, path, parameters=parameters, **options)
            )

    return asyncio.run(scored())


def read_by_the_server(evaluation: Evaluation) -> list[list[int]]:
    details = [generation.details for generation in evaluation.generations]
    return [[token.id for token in one.prefill] for one in details if one is not None]


def read_in_training(model: Path, rows: str, template: str = "{source}\n") -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder = Encoder(tokenizer, PromptTemplate(template), is_encoder_decoder=False)
    examples = read_examples(model.parent / f"{rows}.jsonl", encoder, targets="first")
    return [list(examples[index].source) for index in range(len(examples))]


@pytest.mark.parametrize("rows", DATA)
def test_the_server_reads_the_tokens_of_training(
    server: LiveServer, model: Path, rows: str
) -> None:
    # The server itself writes the chat of one user's message, and no other.
    named = str(model) if rows in ("longer", "both") else None
    found = evaluated(server, rows, rows, model=named)
    assert read_by_the_server(found) == read_in_training(model, rows)
    assert found.template == (None if rows in ("lone", "longer") else "{source}\n")
    if rows == "lone":
        assert [segment.prompt for segment in found.segments] == [
            messages[0]["content"] for messages in LONE
        ]
        assert all(segment.references == ["By the river."] for segment in found.segments)


def test_a_template_that_is_given_makes_the_users_message(server: LiveServer) -> None:
    found = evaluated(server, "lone", "fields", template="Food: {source}")
    tokenizer = AutoTokenizer.from_pretrained(server.server.config.model.model)
    for read, row in zip(read_by_the_server(found), ROWS, strict=False):
        assert tokenizer.decode(read) == (
            f"{BOS}[user] Food: {row['source']}<|im_end|>\n[assistant] "
        )


@pytest.mark.parametrize(
    ("task", "rows", "kind", "message"),
    [
        ("lone", "fields", TrainError, "lone@1 was trained on messages, with no prompt template"),
        ("fields", "lone", TrainError, "fields@1 was trained on rows of a prompt template"),
        ("lone", "longer", DataError, "longer.jsonl:1: the server makes a prompt of one user's"),
        ("longer", "longer", DataError, "longer.jsonl:1: has messages, which the server does not"),
        ("fields-as-chats", "fields", TrainError, "but the task's default chat_template is"),
    ],
)
def test_what_would_be_another_prompt_is_refused(
    server: LiveServer, task: str, rows: str, kind: type[Exception], message: str
) -> None:
    if task == "fields-as-chats":
        with server.client() as client:
            path = Path(server.server.config.model.model).parent / "fields" / "prefix.safetensors"
            client.push(task, path)
            client.update(task, defaults={"chat_template": "model"})
    with pytest.raises(kind, match=message):
        evaluated(server, task, rows)
    assert server.idle
