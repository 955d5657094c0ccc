"""Files to refuse, each with its reason, by readers and writer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefixd_store import (
    InvalidPrefix,
    Limits,
    PrefixArray,
    TooLarge,
    parse_prefix,
    read_manifest,
    validate_file,
    write_prefix,
)
from tests.prefixd_store.checkpoints import random_arrays, raw_file
from tests.prefixd_store.format_files import GOOD, SEVERAL, good_header, metadata

Change = Callable[[dict[str, Any]], object]


def at(*path: str | int, value: Any) -> Change:
    def change(header: dict[str, Any]) -> None:
        target: Any = header
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = value

    return change


def resized(shape: list[Any], nbytes: int, tag: str = "F32") -> Change:
    def change(header: dict[str, Any]) -> None:
        for i, name in enumerate(("decoder.key", "decoder.value")):
            offsets = [i * nbytes, (i + 1) * nbytes]
            header[name] = {"dtype": tag, "shape": shape, "data_offsets": offsets}

    return change


BAD_HEADERS: dict[str, tuple[Change, str]] = {
    "no format": (at("__metadata__", "format", value="pt"), "format is 'pt', expected 'prefixd'"),
    "newer version": (at("__metadata__", "format_version", value="2"), "format_version is '2'"),
    "no metadata": (lambda h: h.pop("__metadata__"), "format is missing"),
    "metadata of numbers": (at("__metadata__", "query_offset", value=8), "strings to strings"),
    "metadata is a list": (at("__metadata__", value=[]), "strings to strings"),
    "no P": (
        lambda h: h["__metadata__"].pop("num_virtual_tokens"),
        "num_virtual_tokens is missing",
    ),
    "P differs": (at("__metadata__", "num_virtual_tokens", value="9"), r"is 9 but .*1, 1, 8, 2"),
    "P is signed": (at("__metadata__", "num_virtual_tokens", value="+8"), "decimal integer"),
    "P is Arabic": (at("__metadata__", "num_virtual_tokens", value="٨"), "decimal integer"),
    "P is long": (at("__metadata__", "num_virtual_tokens", value="8" * 5000), "decimal integer"),
    "offset is 3": (at("__metadata__", "query_offset", value="3"), r"query_offset is 3; .* 0 or"),
    "offset is words": (at("__metadata__", "query_offset", value="x"), "decimal integer"),
    "empty fingerprint": (at("__metadata__", "base_fingerprint", value=""), "printable"),
    "model with a line feed": (at("__metadata__", "base_model", value="a\nb"), "printable"),
    "long model": (at("__metadata__", "base_model", value="a" * 513), "printable"),
    "source format": (at("__metadata__", "source_format", value="A B"), "source_format 'A B'"),
    "provenance is a list": (at("__metadata__", "provenance", value="[1]"), "got list"),
    "provenance is broken": (at("__metadata__", "provenance", value="{"), "provenance: not valid"),
    "provenance is deep": (
        at("__metadata__", "provenance", value='{"a":' * 40 + "1" + "}" * 40),
        "nested over 16",
    ),
    "provenance bomb": (at("__metadata__", "provenance", value='{"a":' + "[" * 50_000), "nested"),
    "provenance is big": (at("__metadata__", "provenance", value=" " * 70_000), "70000 bytes"),
    "provenance has NaN": (at("__metadata__", "provenance", value='{"a": NaN}'), "NaN is not JSON"),
    "provenance overflows": (at("__metadata__", "provenance", value='{"a": 1e999}'), "a float"),
    "provenance huge int": (
        at("__metadata__", "provenance", value='{"a": 99999999999999999999}'),
        "64 bits",
    ),
    "provenance surrogate": (
        at("__metadata__", "provenance", value='{"a": "\\ud800"}'),
        "not valid JSON",
    ),
    "provenance repeats": (
        at("__metadata__", "provenance", value='{"a": 1, "a": 2}'),
        "'a' appears twice",
    ),
    "value missing": (
        lambda h: (h.pop("decoder.value"), h["decoder.key"].update(resized_alone())),
        "decoder.value is missing",
    ),
    "no tensors": (lambda h: (h.pop("decoder.value"), h.pop("decoder.key")), "truncated or padded"),
    "unknown tensor": (
        lambda h: h.update({"decoder.bias": h.pop("decoder.value")}),
        "unknown tensor 'decoder.bias'",
    ),
    "integers": (resized([1, 1, 8, 2], 64, "I32"), "decoder.key is I32"),
    "float64": (resized([1, 1, 8, 1], 64, "F64"), "decoder.key is F64"),
    "made-up dtype": (resized([1, 1, 8, 2], 64, "F31"), "decoder.key is F31"),
    "dtype is a number": (at("decoder.key", "dtype", value=32), "dtype must be a string"),
    "dtypes differ": (
        at(
            "decoder.value",
            value={"dtype": "F16", "shape": [1, 1, 8, 4], "data_offsets": [64, 128]},
        ),
        "differ in dtype",
    ),
    "shapes differ": (
        at("decoder.value", "shape", value=[1, 2, 8, 1]),
        r"key is \[1, 1, 8, 2\] but",
    ),
    "three axes": (resized([1, 8, 2], 64), r"\[L, H_kv, P, D\]"),
    "bool in shape": (at("decoder.key", "shape", value=[True, 1, 8, 2]), "shape must be"),
    "float in shape": (at("decoder.key", "shape", value=[1.0, 1, 8, 2]), "shape must be"),
    "negative shape": (at("decoder.key", "shape", value=[-1, -1, 8, 2]), "shape must be"),
    "shape is text": (at("decoder.key", "shape", value="1182"), "shape must be"),
    "rank 17": (at("decoder.key", "shape", value=[1] * 17), "shape must be"),
    "overflowing shape": (at("decoder.key", "shape", value=[2**62, 2**62, 8, 2]), "takes"),
    "size over 64 bits": (at("decoder.key", "shape", value=[2**70, 1, 8, 2]), "64 bits"),
    "shape too big": (at("decoder.key", "shape", value=[1, 1, 8, 3]), "takes 96 bytes"),
    "offsets backwards": (at("decoder.key", "data_offsets", value=[64, 0]), "begin <= end"),
    "three offsets": (at("decoder.key", "data_offsets", value=[0, 64, 64]), "two integers"),
    "negative offset": (at("decoder.key", "data_offsets", value=[-64, 0]), "two integers"),
    "overlap": (at("decoder.value", "data_offsets", value=[32, 96]), "overlaps"),
    "same bytes twice": (at("decoder.value", "data_offsets", value=[0, 64]), "overlaps"),
    "gap": (at("decoder.value", "data_offsets", value=[72, 136]), "leaves a gap"),
    "starts late": (at("decoder.key", "data_offsets", value=[8, 72]), "leaves a gap|overlaps"),
    "tensor is a list": (at("decoder.key", value=[]), "exactly dtype, shape"),
    "an extra field": (at("decoder.key", "x", value=1), "exactly dtype, shape"),
}


def resized_alone() -> dict[str, Any]:
    return {"shape": [1, 1, 16, 2], "data_offsets": [0, 128]}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_bad_header_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    change, message = BAD_HEADERS[name]
    raw = raw_file(changed(change), bytes(128))
    (tmp_path / "p").write_bytes(raw)
    with pytest.raises(InvalidPrefix, match=message):
        read_manifest(tmp_path / "p")
    with pytest.raises(InvalidPrefix, match=message):
        parse_prefix(raw)


def changed(*changes: Change) -> dict[str, Any]:
    header = good_header()
    for change in changes:
        change(header)
    return header


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes is too short"),
    "eight bytes": (bytes(8), "too short"),
    "truncated data": (GOOD[:-1], "truncated"),
    "truncated header": (GOOD[:40], "truncated"),
    "trailing bytes": (GOOD + b"\0", "truncated or padded"),
    "header past the end": ((2**63).to_bytes(8, "little") + GOOD[8:], "not a safetensors file"),
    "zero header": (bytes(8) + GOOD[8:], "not a JSON object"),
    "a pickle": (b"\x80\x04\x95" + bytes(200), "not a safetensors|truncated"),
    "a zip": (b"PK\x03\x04" + bytes(200), "not a safetensors|truncated"),
    "JSON list": (raw_file(b"[]", bytes(8)), "not a JSON object"),
    "space before the object": (raw_file(b" " + json.dumps(good_header()).encode()), "JSON object"),
    "two objects": (raw_file(b"{}{}"), "not valid JSON"),
    "UTF-16": (raw_file("{}".encode("utf-16")), "not a JSON object"),
    "bad UTF-8": (raw_file(b'{"\xff": 1}'), "not valid JSON"),
    "no tensors": (raw_file({"__metadata__": metadata()}), "holds no tensors"),
    "zero tokens": (raw_file(changed(resized([1, 1, 0, 2], 0))), "each at least 1"),
    "repeated key": (raw_file(b'{"a": 1, "a": 1}'), "'a' appears twice"),
    "bomb": (raw_file(b'{"a":' * 100_000), "nested"),
    "shallow bomb": (raw_file(b'{"a":' * 30 + b"1" + b"}" * 30), "nested"),
    "long integer": (raw_file(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "unaligned": (
        raw_file(json.dumps(good_header()).encode() + b" " * 3, bytes(128), pad=False),
        "multiple of 8",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    raw, message = BAD_FILES[name]
    (tmp_path / "p").write_bytes(raw)
    with pytest.raises(InvalidPrefix, match=message):
        validate_file(tmp_path / "p")
    with pytest.raises(InvalidPrefix, match=message):
        parse_prefix(raw)


def test_the_good_file_of_these_tests_is_good(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(GOOD)
    assert validate_file(tmp_path / "p").num_virtual_tokens == 8
    assert len(json.dumps(good_header())) % 8 != 5  # so that "unaligned" above is


def test_limits_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(GOOD)
    with pytest.raises(TooLarge, match=f"{len(GOOD)} bytes, at most 100"):
        read_manifest(path, Limits(max_bytes=100))
    with pytest.raises(InvalidPrefix, match=r"header of .* at most 64"):
        read_manifest(path, Limits(max_header_bytes=64))
    with pytest.raises(InvalidPrefix, match="8 virtual tokens, at most 7"):
        read_manifest(path, Limits(max_virtual_tokens=7))
    with pytest.raises(TooLarge):
        write_prefix(tmp_path / "q", random_arrays(), query_offset=5, limits=Limits(max_bytes=300))
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        ({}, {}, "no tensors"),
        ({"decoder.key": (1, 1, 2, 2)}, {}, "decoder.value is missing"),
        ({"decoder.key": (1, 2, 2), "decoder.value": (1, 2, 2)}, {}, r"\[L, H_kv, P, D\]"),
        ({"decoder.key": (1, 1, 2, 2), "decoder.value": (1, 1, 2, 3)}, {}, "but decoder.value is"),
        (
            SEVERAL | {"encoder.value": (2, 1, 8, 2)},
            {},
            "encoder.key has 7 virtual tokens but encoder.value has 8",
        ),
        (SEVERAL, {"query_offset": 7}, r"query_offset is 7; .* num_virtual_tokens \(3\)"),
        (
            SEVERAL,
            {"limits": Limits(max_virtual_tokens=20)},
            "cross: 21 virtual tokens, at most 20",
        ),
        ({"decoder.key": (1, 1, 5, 2), "decoder.value": (1, 1, 5, 2)}, {"query_offset": 1}, "is 1"),
        (
            {"decoder.key": (1, 1, 5, 2), "decoder.value": (1, 1, 5, 2)},
            {"provenance": {"x": "y" * 70_000}},
            "provenance has",
        ),
    ],
)
def test_the_writer_refuses_what_the_reader_would(
    tmp_path: Path, names: Any, arguments: Any, message: str
) -> None:
    tensors = {name: PrefixArray.of(np.zeros(shape, np.float32)) for name, shape in names.items()}
    with pytest.raises(InvalidPrefix, match=message):
        write_prefix(tmp_path / "p", tensors, **{"query_offset": 0} | arguments)
    assert not (tmp_path / "p").exists()
