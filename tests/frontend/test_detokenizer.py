"""Pieces joined are the tokenizer's own decoding, and no piece ends inside a character."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from prefixd_server.frontend.detokenizer import Detokenizer
from prefixd_server.frontend.text import TextCodec
from tests.frontend.tokenizers_ import byte_fallback, byte_level

WORDS = [
    "the ",
    "fox",
    " ",
    "\n",
    "é",
    "e\u0301",
    "日本",
    "語",
    "👩‍👩‍👧",
    "🇩🇪",
    "🎉",
    "ก็",
    "▁",
    "<s>",
]
# U+FFFD itself cannot be told from half a character; it has a test of its own.
TEXT = st.lists(
    st.sampled_from(WORDS)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=4),
    max_size=12,
).map("".join)
# The fixtures are immutable tokenizers, so sharing them between examples is safe.
shared = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def pieces(codec: TextCodec, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(codec, prompt or [])
    return [*map(detokenizer.feed, ids), detokenizer.flush()]


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@shared
@given(text=TEXT)
def test_joined_pieces_are_the_decoded_text(
    any_codec: TextCodec, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    ids, _ = any_codec.encode(text)
    joined, whole = "".join(pieces(any_codec, ids)), decode(tokenizer, ids)
    # SmolLM2's vocabulary lacks a few bytes, so it decodes rare characters as U+FFFD itself.
    assert joined == whole.rstrip("\ufffd")


@shared
@given(text=TEXT, data=st.data())
def test_the_output_goes_on_where_the_prompt_ends(
    any_codec: TextCodec, tokenizer: PreTrainedTokenizerBase, text: str, data: st.DataObject
) -> None:
    ids, _ = any_codec.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    whole, prompt = decode(tokenizer, ids), decode(tokenizer, ids[:cut])
    assume(whole.startswith(prompt) and not prompt.endswith("\ufffd"))
    got = pieces(any_codec, ids[cut:], ids[:cut])
    assert "".join(got) == whole[len(prompt) :].rstrip("\ufffd")


@shared
@given(text=TEXT, data=st.data())
def test_an_incomplete_character_at_the_end_is_dropped(
    any_codec: TextCodec, tokenizer: PreTrainedTokenizerBase, text: str, data: st.DataObject
) -> None:
    ids, _ = any_codec.encode(text)
    ids = ids[: data.draw(st.integers(0, len(ids)))]
    # Byte fallback shows one U+FFFD a byte, and for all bytes of the run that does not end well.
    whole = decode(tokenizer, ids)
    joined = "".join(pieces(any_codec, ids))
    assert not joined.endswith("\ufffd")
    assert joined.startswith(whole.rstrip("\ufffd"))
    assert len(joined) <= len(whole)


@shared
@given(ids=st.lists(st.integers(0, 399), max_size=40))
def test_any_tokens_at_all_byte_level(ids: list[int]) -> None:
    tokenizer = BYTE_LEVEL
    joined = "".join(pieces(TextCodec(tokenizer), ids))
    assert joined.rstrip("\ufffd") == decode(tokenizer, ids).rstrip("\ufffd")


@shared
@given(ids=st.lists(st.integers(0, 500), max_size=40))
def test_after_any_tokens_at_all_text_is_text_again(ids: list[int]) -> None:
    codec = TextCodec(BYTE_FALLBACK)
    fox = codec.encode("over the quick brown fox")[0]
    assert "".join(pieces(codec, ids + fox)).endswith("the quick brown fox")


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()


def byte(value: int) -> int:
    return BYTE_FALLBACK.convert_tokens_to_ids(f"<0x{value:02X}>")


def test_bytes_that_spoil_what_is_out_already() -> None:
    """``A`` and half a character, as bytes, decode to U+FFFD twice; the ``A`` is out already."""
    codec = TextCodec(BYTE_FALLBACK)
    ids = [byte(0x41), byte(0xC3), codec.encode("x")[0][-1]]
    stream = DecodeStream(skip_special_tokens=True)
    with pytest.raises(Exception, match="Invalid prefix"):  # what makes DecodeStream no option
        [stream.step(BYTE_FALLBACK.backend_tokenizer, token) for token in ids]
    joined = "".join(pieces(codec, ids))
    assert joined.startswith("A\ufffd")
    assert joined.endswith("x")


def test_endless_bytes_are_not_held_for_ever() -> None:
    detokenizer = Detokenizer(TextCodec(BYTE_FALLBACK))
    assert any(detokenizer.feed(byte(0xC3)) for _ in range(200))


def test_a_real_replacement_character_survives(any_codec: TextCodec) -> None:
    ids, _ = any_codec.encode("a\ufffd\ufffdb")
    assert "".join(pieces(any_codec, ids)) == any_codec.decode(ids)


def test_the_first_token_keeps_its_space() -> None:
    codec = TextCodec(BYTE_FALLBACK)
    prompt, output = codec.encode("the quick")[0], codec.encode("fox")[0][1:]
    assert "".join(pieces(codec, output, prompt)) == " fox"
    assert "".join(pieces(codec, output)) == "fox"


def test_special_and_unknown_tokens_have_no_text(any_codec: TextCodec) -> None:
    ids, _ = any_codec.encode("fox fox")
    special = next(i for i in range(any_codec.vocab_size) if any_codec.is_special(i))
    noisy = [x for token in ids for x in (special, token, any_codec.vocab_size + 7, -1)]
    assert "".join(pieces(any_codec, noisy)) == any_codec.decode(ids)


def test_a_character_over_several_tokens_comes_out_whole(codec: TextCodec) -> None:
    ids, _ = codec.encode("🦥")
    assert len(ids) > 1
    assert pieces(codec, ids) == [*[""] * (len(ids) - 1), "🦥", ""]
