"""An encoder-decoder behind HTTP: its text, its limits, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from prefixd import BadRequestError, InvalidValueError
from prefixd_store import PrefixArray, write_prefix
from tests.support.seq2seq import Seq2SeqReference, random_prefix, tiny_seq2seq_folder
from tests.support.server import LiveServer
from tests.support.threads import one_thread

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = {"decoder": 3, "encoder": 7, "cross": 21}
TEXT = "name : Blue Spice | Type : coffee shop"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_seq2seq_folder("bart", tmp_path_factory.mktemp("bart"))


@pytest.fixture(scope="module")
def live(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(folder, str(tmp_path_factory.mktemp("store"))) as server:
        yield server


def prefix_file(folder: Path, path: Path, *, query_offset: int = 0) -> Path:
    model = Seq2SeqReference(folder).model
    prefix = random_prefix(model, LENGTHS, seed=1)
    tensors = {
        f"{site}.{part}": PrefixArray.of(np.ascontiguousarray(tensor.numpy()))
        for site, pair in prefix.items()
        for part, tensor in zip(("key", "value"), pair, strict=True)
    }
    write_prefix(path, tensors, query_offset=query_offset)
    return path


def test_the_text_is_the_decoders_alone(folder: Path, live: LiveServer, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = Seq2SeqReference(folder)
    prefix = random_prefix(reference.model, LENGTHS, seed=1)
    text = tokenizer(TEXT)["input_ids"]
    with live.client() as client:
        file = prefix_file(folder, tmp_path / "p.safetensors")
        pushed = client.push("e2e", file)
        assert (pushed.num_virtual_tokens, pushed.lengths) == (3, LENGTHS)
        assert client.version("e2e", 1).lengths == LENGTHS
        assert client.pull("e2e", tmp_path / "q").read_bytes() == file.read_bytes()
        for task, used in (("base", {}), ("e2e", prefix)):
            tokens, _ = reference.generate(used, text, 12)
            expected = tokenizer.decode(tokens, skip_special_tokens=True)
            answer = client.generate(task, TEXT, max_new_tokens=12, details=True)
            assert answer.generated_text == expected
            with client.stream(task, TEXT, max_new_tokens=12) as events:
                assert "".join(event.text for event in events if event.text) == expected
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == len(text)
            assert answer.usage.prefix_tokens == (3 if used else 0)
            assert answer.usage.completion_tokens == len(tokens)


def test_encoder_and_decoder_have_a_limit_each(live: LiveServer) -> None:
    with live.client() as client:
        # 1 + 400 + 200 would not fit one context of 512.
        client.generate("base", "a " * 400, max_new_tokens=200)
        with pytest.raises(BadRequestError, match=r"positions each") as caught:
            client.generate("base", "a " * 600, max_new_tokens=1)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(BadRequestError, match=r"max_new_tokens is 512"):
            client.generate("base", "a", max_new_tokens=512)


def test_compiling_a_text_is_refused(live: LiveServer) -> None:
    with live.client() as client, pytest.raises(InvalidValueError, match="encoder-decoder") as e:
        client.compile("hello", "You answer in one sentence.")
    assert (e.value.status, e.value.param) == (422, "text")


def test_log_probabilities_of_the_prompt_are_refused(live: LiveServer) -> None:
    with live.client() as client, pytest.raises(InvalidValueError, match="log-prob") as e:
        client.generate("base", TEXT, max_new_tokens=2, details=True, decoder_input_details=True)
    assert e.value.param == "parameters.decoder_input_details"


def test_an_encoder_prefix_cannot_shift_absolute_positions(
    folder: Path, live: LiveServer, tmp_path: Path
) -> None:
    file = prefix_file(folder, tmp_path / "p.safetensors", query_offset=3)
    with live.client() as client, pytest.raises(InvalidValueError, match="begin at 0") as caught:
        client.push("shifted", file)
    assert caught.value.param == "query_offset"


def test_info_tells_of_the_encoder(folder: Path, live: LiveServer) -> None:
    encoder = Seq2SeqReference(folder).model.get_encoder().config
    with live.client() as client:
        info = client.info().model.encoder
    assert info is not None
    assert (info.num_layers, info.num_kv_heads) == (
        encoder.encoder_layers,
        encoder.encoder_attention_heads,
    )
