"""Any bytes and any header: read by both readers, or refused politely."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixd_store import InvalidPrefix, TooLarge, parse_prefix, read_manifest
from tests.prefixd_store.checkpoints import raw_file
from tests.prefixd_store.format_files import GOOD, good_header


def read_or_refuse(path: Path, raw: bytes) -> None:
    """Both readers agree, and either give arrays inside the buffer or refuse politely."""
    path.write_bytes(raw)
    outcomes: list[Any] = []
    for read in (lambda: read_manifest(path), lambda: parse_prefix(raw)):
        try:
            outcomes.append(read())
        except (InvalidPrefix, TooLarge) as error:
            outcomes.append(error.message)
    manifest, prefix = outcomes
    if isinstance(manifest, str):
        assert manifest == prefix
        return
    assert prefix.manifest == manifest
    size = sum(array.nbytes for array in prefix.arrays.values())
    assert size + min(begin for begin, _ in manifest.offsets.values()) == len(raw)
    manifest.version_record("0" * 64, len(raw)).model_dump_json()


edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert"]), st.integers(0, 700), st.binary(max_size=8)
    ),
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(edits)
def test_fuzz_bytes(tmp_path_factory: pytest.TempPathFactory, changes: Any) -> None:
    raw = bytearray(GOOD)
    for kind, place, extra in changes:
        place %= len(raw) + 1
        if kind == "cut":
            del raw[place : place + len(extra)]
        elif kind == "insert":
            raw[place:place] = extra
        else:
            raw[place : place + len(extra)] = extra
        # Keep the length right, so that most inputs reach the JSON.
        raw[:8] = (
            bytes(8)[len(raw) :] if len(raw) < 8 else max(0, len(raw) - 136).to_bytes(8, "little")
        )
    read_or_refuse(tmp_path_factory.getbasetemp() / "fuzz", bytes(raw))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
json_values = st.recursive(
    scalars | st.sampled_from(["F32", "BF16", "0", "8", "prefixd"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
places = st.sampled_from(
    [("__metadata__", key) for key in (*good_header()["__metadata__"], "provenance", "base_model")]
    + [
        (name, key)
        for name in ("decoder.key", "decoder.value")
        for key in ("dtype", "shape", "data_offsets")
    ]
    + [("__metadata__",), ("decoder.key",), ("encoder.key",), ("",)]
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(places, json_values | json_values.map(json.dumps)), min_size=1, max_size=3)
)
def test_fuzz_header(tmp_path_factory: pytest.TempPathFactory, changes: Any) -> None:
    header = copy.deepcopy(good_header())
    for place, value in changes:
        target: Any = header
        for step in place[:-1]:
            target = target[step]
        if isinstance(target, dict):
            target[place[-1]] = value
    raw = raw_file(header, bytes(128))
    read_or_refuse(tmp_path_factory.getbasetemp() / "fuzz", raw)
