"""Output tokens per second, of prefixd and of its peers: ``python bench/throughput.py``.

W     32 requests at once, prefixes of 20 virtual tokens, short prompts, greedy, fixed length
W1    one request
W128  128 requests (size full)

A rate is output tokens over the whole time, prompts included. All cases take turns in every round.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from harness.alternate import Case, Figures, take_turns
from harness.load import batch
from harness.machine import describe
from harness.options import Options, parser
from harness.peers import PEERS, Job, set_up, start
from harness.prefixes import fill_store, task_names
from harness.processes import Peer, PeerFailed, Served, serve
from harness.report import Report
from rich.console import Console

from prefixd import Client

NUM_VIRTUAL_TOKENS = 20
ADAPTERS = 32
HTTP = {"HTTP streams": True, "HTTP answers": False}
"""one event a token, and whole answers, which is what peers' own calls give"""


class Size(NamedTuple):
    rounds: int
    new_tokens: int
    warm_up_tokens: int
    workloads: tuple[str, ...]
    peers: tuple[str, ...]


SIZES = {
    "smoke": Size(2, 16, 4, ("W", "W1"), ("transformers",)),
    "full": Size(
        5, 64, 64, ("W", "W1", "W128"), ("transformers", "transformers-continuous", "peft")
    ),
}
REQUESTS = {"W": 32, "W1": 1, "W128": 128}
TASKS = {
    "W": {"32 tasks": 32, "one task": 1, "base model": 0},
    "W1": {"one task": 1, "base model": 0},
    "W128": {"128 tasks": 128, "32 tasks": 32, "base model": 0},
}


class Bench:
    """The cases, and which of them are which, for the ratios."""

    def __init__(self, new_tokens: int, workloads: Sequence[str], only: str) -> None:
        self.cases: dict[str, Case] = {}
        self.first_tokens: dict[str, list[int]] = {}
        """of base-model cases: what each answered to the first prompt"""
        self._new_tokens = new_tokens
        self._workloads = workloads
        self._only = re.compile(only)

    def add_server(self, kind: str, run: Callable[[int, int, int], Figures]) -> None:
        """prefixd's engine or its HTTP server: ``run(requests, new_tokens, tasks)``."""
        for workload in self._workloads:
            for label, tasks in TASKS[workload].items():
                self._add(f"{kind}, {workload}, {label}", REQUESTS[workload], tasks, run)

    def add_peer(self, peer: Peer | str, name: str, jobs: Sequence[Job]) -> None:
        """A peer that runs, or the reason why it does not."""
        for workload in self._workloads:
            for job in jobs:
                case = f"{name}, {workload}, {job.label}"
                requests = max(1, REQUESTS[workload] // job.share)
                tasks = min(job.tasks, requests)
                if isinstance(peer, Peer):
                    self._add(case, requests, tasks, peer.run)
                elif self._only.search(case):
                    self.cases[case] = Case(case, dict, failed=peer)

    def _add(
        self, name: str, requests: int, tasks: int, run: Callable[[int, int, int], Figures]
    ) -> None:
        if not self._only.search(name):
            return

        def measured() -> Figures:
            figures = dict(run(requests, self._new_tokens, tasks))
            first = figures.pop("first", None)
            if first and tasks == 0:
                self.first_tokens[name] = first
            return figures

        self.cases[name] = Case(name, measured)

    def warm_up(self, new_tokens: int) -> None:
        """Load prefixes, pack, compile, fill the allocators' caches: each case once, uncounted."""
        new_tokens, self._new_tokens = self._new_tokens, new_tokens
        for case in self.cases.values():
            if not case.failed:
                try:
                    case.run()
                except Exception as error:
                    case.failed = f"{type(error).__name__}: {error}"
        self._new_tokens = new_tokens
        self.first_tokens.clear()

    def agreement(self) -> str:
        """Whether the base model says the same everywhere: float32 greedy tokens."""
        reference = next((k for k in self.first_tokens if k.startswith("transformers, ")), None)
        if reference is None:
            return ""
        expected = self.first_tokens[reference]
        parts = []
        for name, tokens in self.first_tokens.items():
            same = [a == b for a, b in zip(expected, tokens, strict=False)]
            end = same.index(False) if False in same else len(same)
            parts.append(f"{name}: {end}")
        return (
            f"Greedy tokens of the first prompt that equal those of “{reference}” before the first "
            f"that differs, of {len(expected)}: {'; '.join(parts)}."
        )


@contextmanager
def started(options: Options, bench: Bench, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The engine, the server and the peers, all loaded; yields the settings they report."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = folder / "store"
        fill_store(store, task_names(128), options.geometry, NUM_VIRTUAL_TOKENS)
        served = stack.enter_context(serve(options.flags(store)))
        engine = Peer.engine(options.flags(store))
        stack.callback(engine.close)
        engine.wait_until_ready()
        settings = {"prefixd engine": engine.settings}
        bench.add_server("engine", engine.run)
        for kind, stream in HTTP.items():
            bench.add_server(kind, partial(_over_http, served, stream))
        reasons = set_up(names, options.model)
        adapters = _peft_folders(served.url, folder) if "peft" in names else []
        for name in names:
            Console(stderr=True).print(f"start {name}", style="dim")
            peer: Peer | str
            try:
                if name in reasons:
                    raise PeerFailed(reasons[name])
                peer = start(name, options.model, options.threads, adapters)
                stack.callback(peer.close)
                peer.wait_until_ready()
                settings[name] = peer.settings
            except (PeerFailed, OSError) as error:
                peer = str(error)
            bench.add_peer(peer, name, PEERS[name].jobs)
        yield settings


def _over_http(served: Served, stream: bool, requests: int, new_tokens: int, tasks: int) -> Figures:
    with served.turn():
        return batch(served.url, requests, new_tokens, tasks, stream=stream)


def _peft_folders(url: str, folder: Path) -> list[Path]:
    with Client(url) as client:
        return [
            client.pull(name, folder / "peft" / name, format="peft")
            for name in task_names(ADAPTERS)
        ]


def compare(report: Report, bench: Bench, workloads: Sequence[str], peers: Sequence[str]) -> None:
    get = bench.cases.get
    for workload in workloads:
        for kind in ("engine", *HTTP):
            mixed = next(iter(TASKS[workload]))
            of_kind = f"{kind}, {workload}, "
            for other in list(TASKS[workload])[1:]:
                name = f"{kind}, {workload}: {mixed} ÷ {other}"
                report.compare(name, get(of_kind + mixed), get(of_kind + other))
        ours = {kind: get(f"{kind}, {workload}, {mixed}") for kind in ("engine", *HTTP)}
        for kind in HTTP:
            report.compare(f"{workload}: {kind} ÷ engine", ours[kind], ours["engine"])
        for name in peers:
            for job in PEERS[name].jobs:
                theirs = get(f"{name}, {workload}, {job.label}")
                for kind, mine in ours.items():
                    label = f"{workload}: {kind}, {mixed} ÷ {name}, {job.label}"
                    report.compare(label, mine, theirs)


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument(
        "--peers", help=f"comma-separated, `all` or `none`; of: {', '.join(PEERS)}"
    )
    options_parser.add_argument("--workloads", help="comma-separated; of: W, W1, W128")
    options_parser.add_argument("--rounds", type=int)
    options_parser.add_argument("--only", default="", help="run the cases that match this regex")
    arguments = options_parser.parse_args()
    options, size = Options.of(arguments), SIZES[arguments.size]
    names = _names(arguments.peers, size.peers)
    workloads = arguments.workloads.split(",") if arguments.workloads else size.workloads
    rounds = arguments.rounds or size.rounds
    machine = describe(options.threads)
    bench = Bench(size.new_tokens, workloads, arguments.only)
    with started(options, bench, names) as settings:
        bench.warm_up(size.warm_up_tokens)
        take_turns(list(bench.cases.values()), rounds)
    report = Report(
        "throughput",
        arguments.size,
        f"{', '.join(workloads)}: {size.new_tokens} greedy tokens a request, prefixes of "
        f"{NUM_VIRTUAL_TOKENS} virtual tokens, float32, {rounds} rounds.",
        machine,
        options.settings() | settings,
        list(bench.cases.values()),
    )
    compare(report, bench, workloads, names)
    report.notes += [note] if (note := bench.agreement()) else []
    report.publish(save=not arguments.no_save)


def _names(given: str | None, default: Sequence[str]) -> list[str]:
    if given is None:
        return list(default)
    if given in ("all", "none"):
        return list(PEERS) if given == "all" else []
    unknown = set(given.split(",")) - PEERS.keys()
    if unknown:
        raise SystemExit(f"unknown peers: {', '.join(sorted(unknown))}")
    return given.split(",")


if __name__ == "__main__":
    main()
