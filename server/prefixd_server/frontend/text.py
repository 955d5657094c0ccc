"""The tokenizer, safe to use from many threads, and what the frontend needs to know about it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefixd_server.errors import InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextCodec"]


class TextCodec:
    """Text to token ids and back, as the tokenizer itself does it.

    Takes the tokenizer over: truncation and padding are switched off. Fast tokenizers are called
    through their backend, because transformers' own call sets truncation on it each time, which
    fails when another thread is using it; slow ones are plain Python and take a lock.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self._lock = threading.Lock()
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
        """one more than the largest token id; the model's own table may be larger or smaller"""
        added = tokenizer.added_tokens_decoder
        self._special = {i for i, token in added.items() if token.special}
        self._special.update(tokenizer.all_special_ids)
        self._anchor = self._ids("a", special=False)
        self._anchor_text = self.decode(self._anchor)
        self._token_texts: dict[int, str] = {}
        self._alone: dict[int, str] = {}
        self.num_leading, self.num_trailing = self._count_added()

    def encode(self, text: str, *, param: str = "inputs") -> tuple[list[int], int]:
        """The token ids of ``text`` and how many of the first of them the tokenizer added (BOS).

        Strings of special tokens in the text are treated as the tokenizer treats them. Raises
        InvalidRequest on text that is not Unicode (lone surrogates).
        """
        _check_unicode(text, param)
        return self._ids(text, special=True), self.num_leading

    @property
    def has_chat_template(self) -> bool:
        return getattr(self._tokenizer, "chat_template", None) is not None

    def encode_chat(self, text: str, *, param: str = "inputs") -> tuple[list[int], int]:
        """``text`` as a user's message through the model's chat template, up to the answer's start.

        The template writes all special tokens itself, so none is added. Raises as :meth:`encode`.
        """
        message = [{"role": "user", "content": text}]
        with self._lock:
            rendered = self._tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True
            )
        assert isinstance(rendered, str)
        _check_unicode(rendered, param)
        return self._ids(rendered, special=False), 0

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens; half a character gives U+FFFD or nothing."""
        text: str
        if self._backend is not None:
            text = self._backend.decode(ids, skip_special_tokens=True)
        else:
            with self._lock:
                text = self._tokenizer.decode(
                    list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
        return text

    def decode_again(self, ids: Sequence[int]) -> str:
        """As ``decode``; single tokens, of which there are few, are remembered."""
        if len(ids) > 1:
            return self.decode(ids)
        text = self._alone.get(ids[0])
        if text is None:
            text = self._alone[ids[0]] = self.decode(ids)
        return text

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def has_text(self, token_id: int) -> bool:
        """False for special tokens and for ids that only pad the model's embedding table."""
        return 0 <= token_id < self.vocab_size and token_id not in self._special

    def token_text(self, token_id: int) -> str:
        """The text of one token in the middle of a text: with its leading space, if it has one.

        A special token's is its name. Part of a character gives U+FFFD.
        """
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self._token_text(token_id)
        return text

    def _token_text(self, token_id: int) -> str:
        if self.is_special(token_id):
            name: str = self._tokenizer.convert_ids_to_tokens(token_id)
            return name
        if not self.has_text(token_id):
            return ""
        # Decoders strip the space of a text's first token, so put another token in front.
        text = self.decode([*self._anchor, token_id])
        if text.startswith(self._anchor_text):
            return text[len(self._anchor_text) :]
        return self.decode([token_id])

    def _ids(self, text: str, *, special: bool) -> list[int]:
        ids: list[int]
        if self._backend is not None:
            ids = self._backend.encode(text, add_special_tokens=special).ids
        else:
            with self._lock:
                ids = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def _count_added(self) -> tuple[int, int]:
        """How many tokens the tokenizer puts before and after every text."""
        added = self._ids("a", special=True)
        for start in range(len(added) - len(self._anchor) + 1):
            if added[start : start + len(self._anchor)] == self._anchor:
                return start, len(added) - start - len(self._anchor)
        return 0, 0  # the text itself is tokenised otherwise after them: nothing can be told apart


def _check_unicode(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"not Unicode text: a lone surrogate, U+{ord(text[error.start]):04X}, at character"
            f" {error.start}",
            param=param,
        ) from None
