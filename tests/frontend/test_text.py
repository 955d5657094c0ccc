from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from prefixd_server.errors import InvalidRequest
from prefixd_server.frontend.text import TextCodec
from tests.frontend.tokenizers_ import byte_fallback, byte_level

TEXTS = ["", "Blue Spice", " two  spaces ", "naïve 日本語 🎉", "<s> <|im_end|></s>x", "\0\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_tokenizers_own(
    any_codec: TextCodec, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    assert any_codec.encode(text)[0] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("make", "leading", "trailing"),
    [(byte_level, 0, 0), (byte_fallback, 1, 0), (ByT5Tokenizer, 0, 1)],
)
def test_counts_the_tokens_that_the_tokenizer_adds(
    make: Callable[[], PreTrainedTokenizerBase], leading: int, trailing: int
) -> None:
    codec = TextCodec(make())
    ids, num_leading = codec.encode("fox")
    assert num_leading == leading
    assert (codec.num_leading, codec.num_trailing) == (leading, trailing)
    assert len(codec.encode("")[0]) == leading + trailing
    assert all(codec.is_special(token) for token in ids[:leading])
    assert not codec.is_special(ids[leading])


def test_a_bos_in_the_text_is_not_counted() -> None:
    codec = TextCodec(byte_fallback())
    ids, num_leading = codec.encode("<s>fox")
    assert num_leading == 1
    assert ids[:2] == [1, 1]


def test_smollm_adds_nothing_and_parses_special_strings(codec: TextCodec) -> None:
    ids, num_leading = codec.encode("<|im_start|>user")
    assert num_leading == 0
    assert codec.is_special(ids[0])
    assert codec.token_text(ids[0]) == "<|im_start|>"


def test_lone_surrogates_are_the_callers_fault(any_codec: TextCodec) -> None:
    with pytest.raises(InvalidRequest, match="U\\+D83D, at character 3") as raised:
        any_codec.encode("abc\ud83d")
    assert raised.value.param == "inputs"


def test_token_texts_keep_their_space() -> None:
    codec = TextCodec(byte_fallback())
    texts = [codec.token_text(token) for token in codec.encode("the lazy dog")[0]]
    assert "".join(texts) == "<s> the lazy dog"
    assert codec.token_text(codec.vocab_size + 5) == ""


def test_truncation_set_on_the_tokenizer_does_not_apply() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert len(TextCodec(tokenizer).encode("the quick brown fox")[0]) > 2


def test_many_threads(any_codec: TextCodec) -> None:
    texts = [f"{i} " + "naïve 日本語 fox " * (i % 7) for i in range(60)]
    alone = [any_codec.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(any_codec.encode, texts)) == alone
        decoded = threads.map(lambda pair: any_codec.decode(pair[0]), alone)
        assert [text.strip() for text in decoded] == [text.strip() for text in texts]


def test_a_chat_is_rendered_by_the_models_own_template(
    smollm: PreTrainedTokenizerBase,
) -> None:
    codec = TextCodec(smollm)
    assert codec.has_chat_template
    ids, num_leading = codec.encode_chat("hello {{ 7 * 7 }}")
    expected = smollm.apply_chat_template(
        [{"role": "user", "content": "hello {{ 7 * 7 }}"}], add_generation_prompt=True
    )
    assert ids == expected["input_ids"]
    assert num_leading == 0
