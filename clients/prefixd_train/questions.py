"""What a student of a document is asked: questions from a file, or some that the LM writes.

A row of the file is ``{"source": question}`` (or the fields that the prompt template names); where
it has no ``target`` or ``targets`` the LM is to answer. ``{"messages": […]}`` is as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prefixd_train.continuation import continuation, sampled
from prefixd_train.data import Encoder, Texts, read_rows
from prefixd_train.errors import DataError, TooLongError
from prefixd_train.lm import FrozenLM
from prefixd_train.template import shown

__all__ = ["Question", "Questions", "ends_line", "read_questions", "write_questions"]

TEMPERATURE = 0.8
"""of the questions that the LM writes; its answers are greedy"""
MAX_QUESTION_TOKENS = 48

# An LM that is only told to ask asks the same of every text: the first word brings variety.
_OPENERS = ("What", "Who", "How", "When", "Where", "Which", "Why", "Is", "Can", "Does")
_TARGETS = {"target", "targets", "messages"}


class Question(NamedTuple):
    prompt: str
    source: Sequence[int]
    """the prompt's tokens"""
    target: Sequence[int] | None
    """those of the answer, with the end of the text; None: the LM is to answer"""


class Questions(list[Question]):
    num_skipped = 0
    """rows that were too long"""


def read_questions(
    path: Path, encoder: Encoder, *, answer_tokens: int, skip_too_long: bool = False
) -> Questions:
    """``answer_tokens``: the most of an answer that the LM is to write. Raises DataError, which
    names the line, and OSError."""
    found = Questions()
    for row in read_rows(path):
        try:
            found += _questions(row.fields, encoder, answer_tokens)
        except TooLongError as error:
            if not skip_too_long:
                raise TooLongError(f"{row.place}: {error}") from error
            found.num_skipped += 1
        except ValueError as error:
            raise DataError(f"{row.place}: {error}") from error
    if not found:
        raise DataError(f"{path} has no questions{' that fit' * skip_too_long}")
    return found


def _questions(
    fields: Mapping[str, Any], encoder: Encoder, answer_tokens: int
) -> Iterator[Question]:
    if not _TARGETS & fields.keys():
        texts = Texts(encoder.template.render(fields), [])
        source = encoder.encode_source(texts, room_for=answer_tokens)
        yield Question(texts.prompt, source, None)
        return
    texts = encoder.texts(fields)
    for example in encoder.encode(texts):
        yield Question(texts.prompt, example.source, example.target)


def write_questions(
    lm: FrozenLM,
    document: Sequence[int],
    count: int,
    encoder: Encoder,
    *,
    chunk_tokens: int,
    answer_tokens: int,
    seed: int,
    skip_too_long: bool = False,
) -> Iterator[Question]:
    """Each is the LM's own, about a chunk of the document that the seed draws, and one line long.
    The same arguments give the same questions. Raises TooLongError, which names the question."""
    generator = torch.Generator().manual_seed(seed)
    choose, is_end = sampled(generator, TEMPERATURE), ends_line(lm)
    num_skipped = 0
    for index in range(count):
        opener = _OPENERS[index % len(_OPENERS)]
        asked = f"\n\nA question about this text.\nQuestion: {opener}"
        told = lm.tokenizer(asked, add_special_tokens=False).input_ids
        size = min(chunk_tokens, len(document))
        if lm.max_positions is not None:
            size = min(size, lm.max_positions - len(told) - MAX_QUESTION_TOKENS)
        start = int(torch.randint(len(document) - size + 1, (1,), generator=generator))
        prompt = [*document[start : start + size], *told]
        tokens = continuation(lm, {}, prompt, choose, is_end, max_new_tokens=MAX_QUESTION_TOKENS)
        text = opener + lm.tokenizer.decode(tokens, skip_special_tokens=True)
        asks, mark, _ = text.strip().partition("?")
        fields = dict.fromkeys(encoder.template.names, asks + mark)
        try:
            yield from _questions(fields, encoder, answer_tokens)
        except TooLongError as error:
            if not skip_too_long:
                asked = f"question {index + 1} that the model wrote, {shown(asks + mark)}"
                raise TooLongError(f"{asked}: {error}") from error
            num_skipped += 1
    if num_skipped == count:
        raise TooLongError(f"none of the {count} questions that the model wrote fits")


def ends_line(lm: FrozenLM) -> Callable[[int], bool]:
    """Whether a token ends the text or its line."""
    tokenizer = lm.tokenizer

    def is_end(token: int) -> bool:
        return token == tokenizer.eos_token_id or "\n" in tokenizer.decode([token])

    return is_end
