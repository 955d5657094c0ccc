"""Examples from a JSONL file: tokens of what is given and of what is to be said.

A row is ``{"source": …, "target": …}``, ``{"source": …, "targets": […]}`` (each target an example
of its own) or ``{"messages": […]}``, whose last message is the assistant's and the target. Whatever
is wrong with a file ends in :class:`DataError`, which names the file, the line and the value.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from prefixd_train.errors import DataError, TooLongError
from prefixd_train.template import PromptTemplate, lone_message, messages_text, shown, target_texts
from prefixd_train.text_file import check_is_file, without_mark

__all__ = [
    "Encoder",
    "Example",
    "Examples",
    "Row",
    "Texts",
    "check_several",
    "file_sha256",
    "read_examples",
    "read_rows",
    "split",
]

MAX_LINE_BYTES = 16 << 20
"""Longer lines are refused: a file without line ends must not fill the memory."""


class Row(NamedTuple):
    """One line of a file."""

    path: Path
    line: int
    fields: Mapping[str, Any]

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"


class Texts(NamedTuple):
    prompt: str
    targets: Sequence[str]
    templated: bool = False
    """by the chat template, which writes the special tokens itself"""
    message: str | None = None
    """a user's, where the prompt is nothing but it in the chat template"""


class Example(NamedTuple):
    source: Sequence[int]
    target: Sequence[int]
    """ends with the end-of-sequence token"""


class Examples:
    """A file's examples, held as 4 bytes a token. ``lines[i]`` is where example ``i`` is from."""

    def __init__(self) -> None:
        self.lines: list[int] = []
        self.shortest_prompt = ""
        """one to try the task with"""
        self.num_skipped = 0
        """rows that were too long"""
        self.shortest_message: str | None = None
        """that prompt's user message, where each row's prompt is one"""
        self.prompts: set[str] = set()
        """what wrote them: ``template``, ``messages`` (the chat template), or both"""
        self._tokens = array("i")
        self._bounds = array("q", [0])

    def add(self, example: Example, line: int) -> None:
        for part in example:
            self._tokens.extend(part)
            self._bounds.append(len(self._tokens))
        self.lines.append(line)

    def note(self, texts: Texts) -> None:
        """Keep it to show, if it is shorter than those so far; and what wrote it."""
        self.prompts.add("messages" if texts.templated else "template")
        if not self.shortest_prompt:
            self.shortest_prompt, self.shortest_message = texts.prompt, texts.message
        elif (texts.message is None) != (self.shortest_message is None):
            self.shortest_prompt = min(self.shortest_prompt, texts.prompt, key=len)
            self.shortest_message = None
        elif len(texts.prompt) < len(self.shortest_prompt):
            self.shortest_prompt, self.shortest_message = texts.prompt, texts.message

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Example:
        begin, middle, end = self._bounds[2 * index : 2 * index + 3]
        return Example(self._tokens[begin:middle], self._tokens[middle:end])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        starts = self._bounds[::2]
        return [end - begin for begin, end in pairwise(starts)]

    @property
    def num_targets(self) -> int:
        """Tokens that the loss counts."""
        parts = np.diff(np.array(self._bounds))
        return int(parts[1::2].sum())

    def subset(self, lines: set[int]) -> Examples:
        chosen = Examples()
        chosen.shortest_prompt = self.shortest_prompt
        chosen.shortest_message = self.shortest_message
        chosen.prompts = self.prompts
        chosen.num_skipped = self.num_skipped
        for index, line in enumerate(self.lines):
            if line in lines:
                chosen.add(self[index], line)
        return chosen


@dataclass(frozen=True)
class Encoder:
    """Texts → tokens, as the server will make them of a prompt.

    ``max_source`` and ``max_total`` are the most tokens of a source, and of source and target (of
    the target alone for an encoder-decoder), that the LM has room for; None: no limit.
    """

    tokenizer: Any
    template: PromptTemplate
    is_encoder_decoder: bool
    max_source: int | None = None
    max_total: int | None = None

    def texts(self, fields: Mapping[str, Any]) -> Texts:
        """Raises ValueError for a row that is not of one of the three kinds."""
        kinds = [name for name in ("target", "targets", "messages") if name in fields]
        if len(kinds) != 1:
            found = " and ".join(kinds) or f"only {', '.join(fields) or 'nothing'}"
            raise ValueError(f"needs one of target, targets and messages, has {shown(found)}")
        if kinds == ["messages"]:
            prompt, target = messages_text(self.tokenizer, fields["messages"])
            message = lone_message(fields["messages"])
            return Texts(prompt, [target], templated=True, message=message)
        return Texts(self.template.render(fields), target_texts(fields))

    def encode(self, texts: Texts) -> Iterator[Example]:
        """Raises ValueError; TooLongError where there is no room."""
        source = self.encode_source(texts)
        for text in texts.targets:
            target = self._target_ids(text)
            if self.is_encoder_decoder:
                _check_room("the target", len(target), self.max_total)
            else:
                _check_room("source and target", len(source) + len(target), self.max_total)
            yield Example(source, target)

    def encode_source(self, texts: Texts, *, room_for: int = 0) -> list[int]:
        """The prompt's tokens. ``room_for``: those of a target yet to be written, to be checked
        too. Raises as :meth:`encode`."""
        source = self._ids(texts.prompt, special=not texts.templated)
        if not source:
            raise ValueError(f"the prompt {shown(texts.prompt)} has no tokens")
        _check_room("the source", len(source), self.max_source)
        if room_for:
            _check_room("source and answer", len(source) + room_for, self.max_total)
        return source

    def _target_ids(self, text: str) -> list[int]:
        if self.is_encoder_decoder:  # a decoder has special tokens of its own, language codes too
            ids: list[int] = self.tokenizer(text_target=text, verbose=False).input_ids
        else:
            ids = self._ids(text, special=False)
        eos: int = self.tokenizer.eos_token_id
        # A chat template writes the end of the turn itself, and mostly a line end after it.
        return ids[: ids.index(eos) + 1] if eos in ids else [*ids, eos]

    def _ids(self, text: str, *, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids
        return ids


def _check_room(what: str, tokens: int, most: int | None) -> None:
    if most is not None and tokens > most:
        raise TooLongError(f"{what} of {tokens} tokens, where the model has room for {most}")


def read_examples(
    path: Path,
    encoder: Encoder,
    *,
    targets: Literal["all", "first"] = "all",
    too_long: Literal["error", "skip"] = "error",
) -> Examples:
    """All examples of a file. Raises DataError, OSError."""
    examples = Examples()
    for row in read_rows(path):
        try:
            texts = encoder.texts(row.fields)
            if targets == "first":
                texts = texts._replace(targets=texts.targets[:1])
            encoded = list(encoder.encode(texts))
        except TooLongError as error:
            if too_long == "error":
                raise TooLongError(f"{row.place}: {error}") from error
            examples.num_skipped += 1
            continue
        except ValueError as error:
            raise DataError(f"{row.place}: {error}") from error
        examples.note(texts)
        for example in encoded:
            examples.add(example, row.line)
    if not len(examples):
        skipped = examples.num_skipped
        raise DataError(f"{path} has no rows" + (f" that fit ({skipped} skipped)" * bool(skipped)))
    return examples


def read_rows(path: Path) -> Iterator[Row]:
    """The JSON objects of a file, one a line; empty lines are passed over. Raises DataError,
    OSError."""
    check_is_file(path)
    with path.open("rb") as file:
        for line, data in enumerate(_lines(path, file), 1):
            if data.strip():
                try:
                    yield Row(path, line, _parse(data))
                except ValueError as error:
                    raise DataError(f"{path}:{line}: {error}") from error


def check_several(path: Path, examples: Examples, what: str) -> None:
    """Raises DataError for a file of one row; ``what`` takes more."""
    lines = set(examples.lines)
    if len(lines) == 1:
        skipped = examples.num_skipped
        only = f"the only row that fits ({skipped} skipped)" if skipped else "the only row"
        raise DataError(f"{path}:{lines.pop()}: {only}; {what} takes two or more")


def split(
    path: Path, examples: Examples, fraction: float, *, seed: int
) -> tuple[Examples, Examples]:
    """Train and dev: ``fraction`` of the rows, at least one, chosen by the seed. All references of
    a row go the same way. ``path``: the file to name. Raises DataError for one row."""
    check_several(path, examples, f"a dev split of {fraction}")
    lines = sorted(set(examples.lines))
    count = min(max(1, round(len(lines) * fraction)), len(lines) - 1)
    random = np.random.Generator(np.random.PCG64(seed))
    dev = {lines[i] for i in random.permutation(len(lines))[:count]}
    return examples.subset(set(lines) - dev), examples.subset(dev)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lines(path: Path, file: BinaryIO) -> Iterable[bytes]:
    line = 0
    while data := file.readline(MAX_LINE_BYTES + 1):
        line += 1
        data = without_mark(data) if line == 1 else data
        if len(data) > MAX_LINE_BYTES:
            raise DataError(f"{path}:{line}: a line of more than {MAX_LINE_BYTES} bytes")
        yield data


def _parse(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"not UTF-8: byte {byte:#04x} at column {error.start + 1}") from error
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        what = f"{error.msg} at column {error.colno}"
        raise ValueError(f"not JSON: {what}: {shown(text.strip())}") from error
    except RecursionError as error:
        raise ValueError("not JSON: nested too deep") from error
    if not isinstance(fields, dict):
        raise ValueError(f"not a JSON object: {shown(fields)}")
    return fields
