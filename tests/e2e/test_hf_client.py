"""``huggingface_hub``'s own client works on a task's URL, as on text-generation-inference's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from prefixd import Client
from tests.support.server import LiveServer

PROMPT = "The quick brown fox"
SENT_BY_TGI_CLIENTS = (
    "adapter_id", "best_of", "decoder_input_details", "details", "do_sample", "frequency_penalty",
    "grammar", "max_new_tokens", "repetition_penalty", "return_full_text", "seed", "stop",
    "temperature", "top_k", "top_n_tokens", "top_p", "truncate", "typical_p", "watermark",
)  # fmt: skip


@pytest.fixture
def url(live: LiveServer, client: Client, prefixes: list[Path]) -> str:
    client.push("e2e", prefixes[2])
    return f"{live.url}/v1/tasks/e2e/generate"


@pytest.fixture
def hf(url: str) -> Iterator[InferenceClient]:
    with warnings.catch_warnings():
        # It warns, and goes on without details or streams, where it takes us for another server.
        warnings.simplefilter("error")
        yield InferenceClient(model=url)


def test_text(hf: InferenceClient, client: Client) -> None:
    text = hf.text_generation(PROMPT, max_new_tokens=12)
    assert text == client.generate("e2e", PROMPT, max_new_tokens=12).generated_text
    assert text


def test_details(hf: InferenceClient) -> None:
    answer = hf.text_generation(PROMPT, max_new_tokens=6, details=True, top_n_tokens=2)
    assert answer.details is not None
    assert answer.details.finish_reason == "length"
    assert answer.details.generated_tokens == len(answer.details.tokens) == 6
    assert "".join(token.text for token in answer.details.tokens) == answer.generated_text
    top: Any = answer.details.top_tokens  # it leaves these as dicts
    for token, (first, second) in zip(answer.details.tokens, top, strict=True):
        assert (first["id"], first["logprob"]) == (token.id, token.logprob)
        assert first["logprob"] >= second["logprob"]


def test_details_of_the_prompt(hf: InferenceClient) -> None:
    answer = hf.text_generation(PROMPT, max_new_tokens=1, details=True, decoder_input_details=True)
    assert answer.details is not None
    assert "".join(token.text for token in answer.details.prefill) == PROMPT


def test_stream(hf: InferenceClient) -> None:
    pieces = list(hf.text_generation(PROMPT, max_new_tokens=12, stream=True))
    assert len(pieces) == 12
    assert "".join(pieces) == hf.text_generation(PROMPT, max_new_tokens=12)


def test_stream_with_details(hf: InferenceClient) -> None:
    events = list(hf.text_generation(PROMPT, max_new_tokens=5, stream=True, details=True))
    assert [event.index for event in events] == [1, 2, 3, 4, 5]
    assert all(event.details is None for event in events[:-1])
    assert events[-1].details is not None
    assert events[-1].details.generated_tokens == 5
    assert events[-1].generated_text == "".join(event.token.text for event in events)


def test_stop_strings_and_the_whole_text(hf: InferenceClient) -> None:
    text = hf.text_generation(PROMPT, max_new_tokens=24)
    stop = text[len(text) // 2 :][:3]
    stopped = hf.text_generation(PROMPT, max_new_tokens=24, stop=[stop], return_full_text=True)
    assert stopped == PROMPT + text[: text.index(stop)]


def test_sampling_with_a_seed(hf: InferenceClient) -> None:
    def draw(seed: int) -> str:
        return hf.text_generation(
            PROMPT, max_new_tokens=16, do_sample=True, temperature=1.3, top_p=0.95, seed=seed
        )

    first, same, other = draw(1), draw(1), draw(2)
    assert first == same != other


def test_errors_arrive(hf: InferenceClient, live: LiveServer) -> None:
    with pytest.raises(HfHubHTTPError) as caught:
        hf.text_generation(PROMPT, top_p=2.0)
    assert caught.value.response.status_code == 422
    unknown = InferenceClient(model=f"{live.url}/v1/tasks/unknown/generate")
    with pytest.raises(HfHubHTTPError) as caught:
        unknown.text_generation(PROMPT)
    assert caught.value.response.status_code == 404


def test_every_field_may_be_null(url: str) -> None:
    """As older clients and those of other languages send all of them."""
    body: dict[str, Any] = {"inputs": PROMPT, "parameters": dict.fromkeys(SENT_BY_TGI_CLIENTS)}
    answer = httpx.post(url, json={**body, "stream": None}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["generated_text"]


@pytest.mark.parametrize("field", ["adapter_id", "watermark"])
def test_what_is_not_implemented_is_refused(url: str, field: str) -> None:
    value: object = {"adapter_id": "other", "watermark": True}[field]
    answer = httpx.post(url, json={"inputs": PROMPT, "parameters": {field: value}}, timeout=60)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == f"parameters.{field}"
