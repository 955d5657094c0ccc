"""The benchmarks' own logic: rounds, ratios, records, the peers' protocol. Asserts no speed."""

from __future__ import annotations

import json
import socket
import sys
import threading
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


def test_a_chart_shows_the_newest_run_beside_peers_from_elsewhere(
    harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    import charts

    def record(date: str, *names: str, size: str = "full") -> str:
        return json.dumps({"date": date, "size": size, "cases": [{"name": n} for n in names]})

    ours, openvino = "engine, W, one task", "openvino, W, base model"
    one_stream = "vllm, W1, base model"
    runs = [
        record("1", ours, openvino),
        record("2", ours, openvino, one_stream),
        record("3", ours, "transformers, W, base model", "peft, W, one task, one batch"),
        record("4", ours, openvino, "a case of a smaller run", size="smoke"),
    ]
    (tmp_path / "results").mkdir()
    (tmp_path / "results/throughput.jsonl").write_text("\n".join(runs))
    monkeypatch.setattr(charts, "BENCH", tmp_path)
    shown = charts.newest("throughput", "full")
    assert [case["name"] for case in shown["cases"]] == [ours, openvino, one_stream]
    assert charts.newest("latency", "full") is None
    del sys.modules["charts"]


@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_a_connection_reads_each_answer_whole(harness: Any, pieces: int) -> None:
    import harness.load

    def answer(status: str, text: bytes) -> bytes:
        return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(text), text)

    answers = [answer("200 OK", b"{}"), answer("200 OK", b"x" * 5000), answer("409 No", b"why")]
    asked = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            for data in answers:
                asked.append(connection.recv(4096).split(b"\r\n")[0])
                step = -(-len(data) // pieces)
                for begin in range(0, len(data), step):
                    connection.sendall(data[begin : begin + step])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve)
        server.start()
        connection = harness.load.Connection(f"http://127.0.0.1:{listener.getsockname()[1]}")
        connection.post("/a", {})
        connection.post("/b", {})
        with pytest.raises(RuntimeError, match="/c: why"):
            connection.post("/c", {})
        server.join()
        with pytest.raises((RuntimeError, OSError)):
            connection.post("/d", {})
        connection.close()
    assert asked == [b"POST /%c HTTP/1.1" % name for name in b"abc"]
