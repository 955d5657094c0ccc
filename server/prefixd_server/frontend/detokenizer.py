"""Incremental detokenisation: token ids in, whole characters out."""

from __future__ import annotations

from collections.abc import Sequence

from prefixd_server.frontend.text import TextCodec

__all__ = ["Detokenizer"]

_INCOMPLETE = "\ufffd"
_MAX_HELD = 64
"""tokens held back at most. A character has at most four bytes, so this only bounds the work on
output that is no text at all."""
_MIN_CONTEXT, _MAX_CONTEXT = 4, 24


class Detokenizer:
    """The text that each generated token adds to the prompt's.

    A token's text depends on the tokens before it (a leading space, bytes of one character), so the
    window that is decoded starts at the last tokens of the prompt, and then at those of the last
    piece, as in vLLM and TGI. ``tokenizers.DecodeStream`` is the same loop, but it loses text when
    bytes that are no UTF-8 change what came before them ("Invalid prefix encountered"), and slow
    tokenizers do not have it. This takes one or two microseconds a token.
    """

    def __init__(self, codec: TextCodec, prompt_ids: Sequence[int] = ()) -> None:
        self._codec = codec
        self._window = _tail(codec, prompt_ids)
        self._num_shown = len(self._window)
        self._shown = codec.decode(self._window)

    def feed(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        if not self._codec.has_text(token_id):
            return ""
        self._window.append(token_id)
        text = self._codec.decode(self._window)
        complete = len(text) > len(self._shown) and not text.endswith(_INCOMPLETE)
        if not complete and len(self._window) - self._num_shown < _MAX_HELD:
            return ""
        piece = self._new(text)
        del self._window[: self._num_shown]
        self._num_shown = len(self._window)
        self._shown = self._codec.decode_again(self._window)
        return piece

    def flush(self) -> str:
        """What was held back, without the incomplete character at its end. Nothing may follow."""
        if len(self._window) == self._num_shown:
            return ""
        return self._new(self._codec.decode(self._window)).rstrip(_INCOMPLETE)

    def _new(self, text: str) -> str:
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        # Bytes that are no UTF-8 spoiled text that is out already: go on with the new tokens alone.
        return self._codec.decode(self._window[self._num_shown :])


def _tail(codec: TextCodec, prompt_ids: Sequence[int]) -> list[int]:
    """The last few tokens of the prompt, from the start of a character on."""
    tail: list[int] = []
    for token_id in reversed(prompt_ids):
        if codec.has_text(token_id):
            tail.insert(0, token_id)
            if len(tail) >= _MIN_CONTEXT and _INCOMPLETE not in codec.decode(tail):
                break
        if len(tail) == _MAX_CONTEXT:
            break
    return tail
