"""``--model demo`` is converted once, whole or not at all, by the server or by the trainer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

import prefixd_server.models.demo
import prefixd_train.demo
from prefixd_server.errors import UnsupportedModel


class Conversion:
    """In place of reading the GGUF, which takes long: writes a folder, or fails half way."""

    def __init__(self, parties: int = 1, *, fail: bool = False) -> None:
        self.together = Barrier(parties)
        self.fail = fail
        self.count = 0

    def __call__(self, gguf: Path, target: Path) -> None:
        self.count += 1
        target.mkdir()
        (target / "weights").write_text("whole")
        self.together.wait(60)  # all have begun before any ends
        if self.fail:
            raise RuntimeError("no space left")
        (target / "config.json").write_text("{}")


@pytest.fixture(params=[prefixd_server.models.demo, prefixd_train.demo], ids=["server", "trainer"])
def demo(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def packaged(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_packaged_gguf", lambda: Path("demo.gguf"))


@pytest.mark.usefixtures("packaged")
def test_two_first_starts_at_once_both_get_the_whole_demo(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion = Conversion(parties=2)
    monkeypatch.setattr(demo, "_convert", conversion)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(demo.demo_model_folder, [tmp_path, tmp_path])
    assert first == second
    assert sorted(path.name for path in first.iterdir()) == ["config.json", "weights"]
    assert [path.name for path in first.parent.iterdir()] == [first.name], "scratch was left"
    assert demo.demo_model_folder(tmp_path) == first
    assert conversion.count == 2


@pytest.mark.usefixtures("packaged")
def test_a_conversion_that_fails_leaves_nothing_behind(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_convert", Conversion(fail=True))
    with pytest.raises(RuntimeError, match="no space"):
        demo.demo_model_folder(tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_the_demo_says_what_to_install(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises((UnsupportedModel, FileNotFoundError), match=r"prefixd\[demo\]"):
        demo.demo_model_folder(tmp_path)


def test_whoever_is_first_converts_it_for_both(tmp_path: Path) -> None:
    converted = tmp_path / "models" / prefixd_server.models.demo.DEMO_NAME
    converted.mkdir(parents=True)
    (converted / "config.json").write_text("{}")
    for each in (prefixd_server.models.demo, prefixd_train.demo):
        assert each.demo_model_folder(tmp_path) == converted
