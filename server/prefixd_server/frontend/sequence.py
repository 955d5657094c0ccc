"""One sequence's outputs as text: what a stream shows, and the completion at its end."""

from __future__ import annotations

from collections.abc import Sequence

from prefixd_server.frontend.calls import Chunk, Completion, TextToken
from prefixd_server.frontend.detokenizer import Detokenizer
from prefixd_server.frontend.stop_strings import StopChecker
from prefixd_server.frontend.text import TextCodec
from prefixd_server.types import EngineRequest, FinishReason, Output, Started, Token

__all__ = ["SequenceText"]

_ENDS = (FinishReason.LENGTH, FinishReason.EOS, FinishReason.STOP)


class SequenceText:
    """Turns the engine's outputs of one request into chunks, one a token.

    The texts of the tokens joined are the completion's text. The token that ends the sequence (EOS
    or one of ``stop_token_ids``) is special and has no text of its own, only what was held back for
    an incomplete stop string.
    """

    def __init__(
        self,
        codec: TextCodec,
        request: EngineRequest,
        stops: Sequence[str],
        *,
        context: Sequence[int],
    ) -> None:
        """``context``: the tokens that the output continues."""
        self._codec = codec
        self._request = request
        self._detokenizer = Detokenizer(codec, context)
        self._stops = StopChecker(stops)
        self._started: Started | None = None
        self._tokens: list[TextToken] = []
        self.completion: Completion | None = None
        """set when the sequence has ended well"""

    def feed(self, output: Output) -> list[Chunk]:
        """The chunks of this output; what follows the end of the sequence is left out."""
        self._started = output.started or self._started
        chunks: list[Chunk] = []
        for i, token in enumerate(output.tokens):
            is_last = output.finish is not None and i == len(output.tokens) - 1
            reason = output.finish.reason if output.finish and is_last else None
            chunks.append(self._chunk(token, reason))
            if self.completion is not None:
                break
        return chunks

    def _chunk(self, token: Token, reason: FinishReason | None) -> Chunk:
        is_end = reason in (FinishReason.EOS, FinishReason.STOP)
        text = self._stops.feed("" if is_end else self._detokenizer.feed(token.id))
        if reason in _ENDS:
            text += self._stops.feed(self._detokenizer.flush()) + self._stops.flush()
        if self._stops.matched:
            reason = FinishReason.STOP
        special = is_end or self._codec.is_special(token.id)
        top = self._top(token) if token.top else ()
        shown = TextToken(token.id, text, token.logprob, special, top)
        self._tokens.append(shown)
        if reason in _ENDS:
            self.completion = self._complete(reason)
        return Chunk(len(self._tokens), shown, self.completion)

    def _top(self, token: Token) -> tuple[TextToken, ...]:
        return tuple(self._text_token(token_id, logprob) for token_id, logprob in token.top)

    def _text_token(self, token_id: int, logprob: float | None) -> TextToken:
        codec = self._codec
        return TextToken(
            token_id, codec.token_text(token_id), logprob, special=codec.is_special(token_id)
        )

    def _complete(self, reason: FinishReason) -> Completion:
        assert self._started is not None, "a token came before Started"
        sampling = self._request.sampling
        return Completion(
            text="".join(token.text for token in self._tokens),
            finish_reason=reason,
            tokens=tuple(self._tokens),
            prefill=self._prefill(self._started) if sampling.prompt_logprobs else (),
            seed=None if sampling.greedy else sampling.seed,
            version=self._started.version,
            prompt_tokens=len(self._started.prompt_token_ids),
            prefix_tokens=self._started.prefix_tokens,
        )

    def _prefill(self, started: Started) -> tuple[TextToken, ...]:
        ids = started.prompt_token_ids
        logprobs: tuple[float | None, ...] = started.prompt_logprobs
        if len(logprobs) == len(ids) - 1:
            logprobs = (None, *logprobs)  # nothing precedes the first token, not even a prefix
        return tuple(self._text_token(*pair) for pair in zip(ids, logprobs, strict=True))
