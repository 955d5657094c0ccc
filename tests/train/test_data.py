"""What a file of examples says reaches the LM token for token; what is wrong with it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from prefixd_train import data
from prefixd_train.data import Encoder, read_examples, split
from prefixd_train.errors import DataError, TooLongError
from prefixd_train.template import PromptTemplate
from tests.support.models import demo_folder
from tests.train.conftest import ROWS, Write


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_folder())


@pytest.fixture
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, PromptTemplate("{source}\n"), is_encoder_decoder=False)


def test_each_target_is_an_example_after_its_prompt(
    write: Write, encoder: Encoder, tokenizer: Any
) -> None:
    rows = [{"source": "a b", "targets": ["x", "y z"]}, {"source": "c", "target": "w", "id": 3}]
    examples = read_examples(write(rows), encoder)
    eos = tokenizer.eos_token
    texts = [tuple(map(tokenizer.decode, examples[i])) for i in range(len(examples))]
    assert texts == [("a b\n", f"x{eos}"), ("a b\n", f"y z{eos}"), ("c\n", f"w{eos}")]
    assert examples.lines == [1, 1, 2]
    assert examples.lengths == [sum(map(len, examples[i])) for i in range(3)]
    assert examples.num_targets == sum(len(examples[i].target) for i in range(3))
    assert examples.shortest_prompt == "c\n"
    assert len(read_examples(write(rows), encoder, targets="first")) == 2


def test_of_messages_the_last_is_the_target(write: Write, encoder: Encoder, tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Name?"},
        {"role": "assistant", "content": "The Mill."},
    ]
    (source, target) = read_examples(write([{"messages": messages}]), encoder)[0]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode([*source, *target]) == whole.rstrip("\n")
    assert tokenizer.decode(target) == f"The Mill.{tokenizer.eos_token}"


def test_an_encoder_decoder_reads_the_source_and_writes_the_target(
    tokenizer: Any, write: Write
) -> None:
    encoder = Encoder(tokenizer, PromptTemplate("{source}"), is_encoder_decoder=True, max_total=4)
    source, target = read_examples(write([{"source": "a " * 20, "target": "x"}]), encoder)[0]
    assert tokenizer.decode(source) == "a " * 20
    assert tokenizer.decode(target) == f"x{tokenizer.eos_token}"
    with pytest.raises(TooLongError, match=r":1: the target of 7 tokens, .* room for 4"):
        read_examples(write([{"source": "a", "target": "x " * 5 + "x"}]), encoder)


GOOD = '{"source": "s", "target": "t"}\n'
BAD_LINES = {
    "": "has no rows",
    "{": r":1: not JSON: Expecting .* at column 2: '\{'",
    GOOD + "[1]": r":2: not a JSON object: \[1\]",
    GOOD + "\n" + '"x"': ":3: not a JSON object: 'x'",
    "[" * 100_000: ":1: not JSON: nested too deep",
    '{"target": "t"}': ":1: has no source, which the prompt template names",
    '{"source": "s"}': ":1: needs one of target, targets and messages, has 'only source'",
    '{"source": "s", "target": "t", "targets": ["u"]}': ":1: needs one .* 'target and targets'",
    '{"source": 3, "target": "t"}': ":1: source must be a text that is not empty, not 3",
    '{"source": "", "target": "t"}': ":1: source must be .* not ''",
    '{"source": "s", "target": " "}': ":1: target must be a text that is not empty, not ' '",
    '{"source": "s", "target": null}': ":1: target must be .* not None",
    '{"source": "s", "targets": []}': r":1: targets must be a list .* not \[\]",
    '{"source": "s", "targets": ["a", ""]}': r":1: targets\[1\] must be .* not ''",
    '{"source": "s", "target": "\\ud800"}': r":1: target holds a lone surrogate, U\+D800",
    '{"messages": "hi"}': ":1: messages must be a list of two or more, not 'hi'",
    '{"messages": [1, 2]}': r":1: messages\[0\] must be an object, not 1",
    '{"messages": [{"role": "bot", "content": "x"}, {}]}': r"\[0\].role is 'bot'; known are system",
    '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}': (
        r":1: messages\[1\].content must be text, not ''"
    ),
    '{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}': (
        "last message must be the assistant's, is the user's"
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD_LINES.items(), ids=lambda value: value[:40])
def test_a_bad_line_is_named_with_its_value(
    tmp_path: Path, encoder: Encoder, text: str, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_examples(path, encoder)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 400


def test_a_wrong_encoding_is_named_by_its_byte(tmp_path: Path, encoder: Encoder) -> None:
    path = tmp_path / "latin1.jsonl"
    path.write_bytes(GOOD.encode() + '{"source": "é", "target": "t"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r":2: not UTF-8: byte 0xe9 at column 13"):
        read_examples(path, encoder)


def test_a_line_without_end_does_not_fill_the_memory(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MAX_LINE_BYTES", 100)
    path = tmp_path / "long.jsonl"
    path.write_text(GOOD + GOOD.strip() + " " * 100)
    with pytest.raises(DataError, match=r":2: a line of more than 100 bytes"):
        read_examples(path, encoder)


def test_too_long_rows_end_the_run_or_are_skipped(write: Write, tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, PromptTemplate("{source}"), is_encoder_decoder=False, max_total=8)
    path = write([{"source": "a", "target": "b"}, {"source": "a " * 9, "target": "b"}])
    with pytest.raises(TooLongError, match=r":2: source and target of \d+ tokens, .* room for 8"):
        read_examples(path, encoder)
    examples = read_examples(path, encoder, too_long="skip")
    assert (len(examples), examples.num_skipped) == (1, 1)
    with pytest.raises(DataError, match=r"no rows that fit \(1 skipped\)"):
        read_examples(write([{"source": "a " * 9, "target": "b"}]), encoder, too_long="skip")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{source.__class__}", "is not a plain name"),
        ("{source[0]}", "is not a plain name"),
        ("{source!r}", r"\{source!r\} is not a plain name"),
        ("{source:>9}", r"\{source:>9\} is not a plain name"),
        ("{}", "is not a plain name"),
        ("{source", "expected '}'"),
        ("no field", "has no field"),
    ],
)
def test_a_template_has_plain_names_alone(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptTemplate(template)


def test_a_template_fills_its_names() -> None:
    template = PromptTemplate("{{{topic}}}: {source} =>")
    assert template.render({"topic": "food", "source": "{x}", "more": 1}) == "{food}: {x} =>"


def test_a_split_keeps_the_references_of_a_row_together(write: Write, encoder: Encoder) -> None:
    path = write(ROWS)
    examples = read_examples(path, encoder)
    train, dev = split(path, examples, 0.25, seed=1)
    assert len(set(dev.lines)) == 2
    assert not set(train.lines) & set(dev.lines)
    assert sorted(train.lines + dev.lines) == examples.lines
    assert split(path, examples, 0.25, seed=1)[1].lines == dev.lines


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path, encoder: Encoder) -> None:
    path = tmp_path / "notepad.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() * 2)
    assert len(read_examples(path, encoder)) == 2
    path.write_bytes(GOOD.encode() + b"\xef\xbb\xbf" + GOOD.encode())
    with pytest.raises(DataError, match=r"jsonl:2: not JSON: .* at column 1: '\\ufeff"):
        read_examples(path, encoder)
