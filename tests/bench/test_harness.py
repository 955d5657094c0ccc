"""The benchmarks' own logic: rounds, ratios, records, the peers' protocol. Asserts no speed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The scripts run with bench/ on the path; its modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    import harness.alternate
    import harness.processes
    import harness.report

    yield harness
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("harness", "peers"):
            del sys.modules[name]


def case(harness: Any, name: str, seconds: list[float]) -> Any:
    times = iter(seconds)
    return harness.alternate.Case(name, lambda: {"tokens": 12, "seconds": next(times)})


def test_cases_take_turns(harness: Any) -> None:
    order: list[str] = []

    def run(name: str) -> Any:
        return lambda: order.append(name) or {"tokens": 1, "seconds": 1.0}

    cases = [harness.alternate.Case(name, run(name)) for name in "ab"]
    harness.alternate.take_turns(cases, 3)
    assert order == list("ababab")


def test_a_ratio_is_of_each_round(harness: Any) -> None:
    # The machine slows down fourfold from round to round; b is always half as fast as a.
    a, b = case(harness, "a", [1, 4, 16]), case(harness, "b", [2, 8, 32])
    c = case(harness, "c", [3, 4, 4])
    harness.alternate.take_turns([a, b, c], 3)
    assert harness.alternate.ratio(a, b) == (2, 2, 2)
    assert harness.alternate.ratio(a, c) == (1, 0.25, 3)
    assert a.spread() == (3, 0.75, 12)


def test_a_case_that_fails_is_reported_and_the_others_go_on(
    harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = harness.report
    monkeypatch.setattr(report, "RAW", tmp_path / "results")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "RESULTS.md")
    good, bad = case(harness, "good", [1, 2]), case(harness, "bad", [1])
    harness.alternate.take_turns([good, bad], 2)
    machine = {
        "commit": "c0ffee", "cpu": "a CPU", "cpu_family_model": "1/2", "cpu_flags": ["avx2"],
        "cores": 2, "threads": 2, "memory_gib": 8, "system": "Linux", "python": "3.11",
        "versions": {"torch": "2"}, "load_before": 0.1,
    }  # fmt: skip
    made = report.Report("sample", "smoke", "What.", machine, {"flags": "none"}, [good, bad])
    made.compare("good ÷ bad", good, bad)
    made.publish(save=True)
    made.publish(save=False)
    table = (tmp_path / "RESULTS.md").read_text()
    assert "| good | 9.00 (6.00 … 12.0) |" in table
    assert "| bad | failed: StopIteration" in table
    assert "| good ÷ bad | – | – |" in table
    (record,) = map(json.loads, (tmp_path / "results" / "sample.jsonl").read_text().splitlines())
    assert [run["tokens_per_s"] for run in record["cases"][0]["runs"]] == [12, 6]
    assert record["machine"] == machine


RUNNER = """
import os, sys
from peer import serve

print("a library says hello")
os.write(1, b"and so does its C code\\n")

def run(requests, new_tokens, tasks):
    if tasks == 9:
        sys.exit("out of memory")
    if tasks == 8:
        return 0.5
    return [[7] * (new_tokens - (tasks == 7))] * requests

serve(run, {"version": "1"}, lambda: {"more": 3})
"""


def wait_until_stopped(pid: int) -> None:
    """It is not its turn."""
    state = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 10
    while state.read_text().split()[2] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_protocol_of_peers(harness: Any, tmp_path: Path) -> None:
    script = tmp_path / "runner.py"
    script.write_text(RUNNER)
    peer = harness.processes.Peer("fake", [sys.executable, str(script)])
    try:
        peer.wait_until_ready()
        wait_until_stopped(peer._process.pid)
        assert peer.settings == {"version": "1"}
        figures = peer.run(3, 4, 0)
        assert figures.pop("seconds") >= 0
        assert figures == {"tokens": 12, "first": [7, 7, 7, 7], "more": 3}
        wait_until_stopped(peer._process.pid)
        assert peer.run(3, 4, 8) == {"tokens": 12, "seconds": 0.5}
        with pytest.raises(harness.processes.PeerFailed, match="3 answers, \\[3\\] tokens long"):
            peer.run(3, 4, 7)
        with pytest.raises(harness.processes.PeerFailed, match="exit 1: out of memory"):
            peer.run(3, 4, 9)
    finally:
        peer.close()
