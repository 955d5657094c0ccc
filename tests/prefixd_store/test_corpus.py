"""Damaged and mismatched checkpoints of every format: each refused with a reason to act on.

A case writes a checkpoint that would be accepted, damages it or takes another model, and names
what the refusal must say. Nothing may be executed and nothing stored. Pickles are made with torch,
as their owners have them, and go through the client's half of a push first.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixd import CheckpointError
from prefixd._checkpoint import files_to_send
from prefixd_store import Geometry, InvalidPrefix, Limits, TooLarge, import_checkpoint
from tests.prefixd_store.corpus import CORPUS, PEFT_LLAMA, bart, ft, gpt2, peft, words
from tests.prefixd_store.damage import Build, lists, ours, shared
from tests.prefixd_store.foreign import BART, GPT2, LLAMA


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    yield folder
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", CORPUS)
def test_refused(name: str, folder: Path, tmp_path: Path) -> None:
    case = CORPUS[name]
    case.build(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    stored = tmp_path / "stored"
    stored.mkdir()
    with pytest.raises((InvalidPrefix, TooLarge, CheckpointError)) as refusal:
        push(folder, case.model, stored / "prefix")
    message = str(refusal.value)
    assert re.search(case.reason, message), message
    assert len(message) < 1000, "a reason, not a dump"
    assert list(stored.iterdir()) == []
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def push(folder: Path, model: Geometry, out: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        files = {file.name: file for file in files_to_send(folder, Path(scratch))}
        import_checkpoint(files, out, geometry=model, fingerprint="aa", limits=Limits())


@pytest.mark.parametrize(
    ("build", "model"),
    [
        (ours(), GPT2),
        (peft, PEFT_LLAMA),
        (lists(), LLAMA),
        (gpt2, GPT2),
        (words, GPT2),
        (bart, BART),
        (shared("gpt2"), GPT2),
        (shared("bart"), BART),
        (ft, GPT2),
    ],
)
def test_undamaged_it_is_accepted(build: Build, model: Geometry, folder: Path) -> None:
    """Or the refusals above would prove nothing."""
    build(folder)
    push(folder, model, folder.parent / "prefix")
    assert (folder.parent / "prefix").stat().st_size > 0


def test_the_corpus_is_large() -> None:
    formats = {name.partition(":")[0] for name in CORPUS if ":" in name}
    assert len(CORPUS) >= 40
    assert formats >= {
        "ours",
        "peft",
        "cartridge",
        "gpt2",
        "bart",
        "adapterhub",
        "fastertransformer",
    }
