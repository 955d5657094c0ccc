"""What many tasks cost: start, memory, a change, a load and what a load takes from the others.

``python bench/residency.py`` registers the tasks in a fresh store (a folder, a private Redis, or
both in turn), then measures the registry and residency without any language model. Prefixes have
the demo model's shape; most tasks name one small prefix, ``--prefixes`` of them one of their own.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from subprocess import DEVNULL

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from prefixd_server.config import CacheConfig, LimitsConfig
from prefixd_server.kv.allocator import PageAllocator, pages_for
from prefixd_server.kv.pool import KVPool
from prefixd_server.prefix import Lease, Registry, Residency
from prefixd_server.types import PrefixVersion
from prefixd_store import Geometry, PrefixArray, open_store, write_prefix
from prefixd_store.format import parse_prefix, read_manifest
from prefixd_store.records import VersionRecord
from prefixd_store.store import Store

TENANT = "default"
GEOMETRY = Geometry(num_layers=30, num_kv_heads=3, head_dim=64)
"""SmolLM2-135M's"""
PAGE_SIZE = 16
STEP_S = 0.02

Figures = dict[str, str]


# --- the store ------------------------------------------------------------------------------------


@contextmanager
def fresh_store(kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty store."""
    if kind == "disk":
        yield str(folder / "store")
        return
    socket_path = folder / "redis.sock"
    options = ["--port", "0", "--unixsocket", str(socket_path), "--save", "", "--dir", str(folder)]
    server = subprocess.Popen(["redis-server", *options, "--appendonly", "yes"], stdout=DEVNULL)
    try:
        while not socket_path.exists():
            time.sleep(0.02)
        yield f"unix://{socket_path}"
    finally:
        server.kill()
        server.wait()


def write_blob(folder: Path, num_tokens: int, seed: int) -> tuple[Path, VersionRecord]:
    random = np.random.default_rng(seed)
    shape = (GEOMETRY.num_layers, GEOMETRY.num_kv_heads, num_tokens, GEOMETRY.head_dim)
    key, value = random.normal(size=(2, *shape)).astype(np.float32)
    path = folder / f"{num_tokens}-{seed}.safetensors"
    tensors = {"decoder.key": PrefixArray.of(key), "decoder.value": PrefixArray.of(value)}
    sha256 = write_prefix(path, tensors, query_offset=num_tokens)
    return path, read_manifest(path).version_record(sha256, path.stat().st_size)


def task_name(number: int) -> str:
    return f"task-{number:06}"


def fill(store: Store, folder: Path, arguments: argparse.Namespace) -> float:
    """Publish all tasks; returns the seconds one publication took."""
    small = write_blob(folder, 1, seed=0)
    start = time.perf_counter()
    for number in range(arguments.tasks):
        own = number < arguments.prefixes
        path, record = write_blob(folder, arguments.tokens, number) if own else small
        store.put_version(TENANT, task_name(number), path, record)
    return (time.perf_counter() - start) / arguments.tasks


# --- measuring ------------------------------------------------------------------------------------


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def milliseconds(work: Callable[[], object], runs: int) -> str:
    """Median and worst of ``runs`` runs."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return f"{statistics.median(times) * 1e3:.3f} (worst {max(times) * 1e3:.3f})"


def measure_registry(url: str, arguments: argparse.Namespace) -> Figures:
    figures: Figures = {}
    store, other_store = open_store(url), open_store(url)
    registry = Registry(store, LimitsConfig())
    before, start = resident_bytes(), time.perf_counter()
    registry.start()
    figures["start, s"] = f"{time.perf_counter() - start:.2f}"
    grown = resident_bytes() - before
    figures["memory a task, KiB"] = f"{grown / arguments.tasks / 1024:.2f}"

    names = cycle(range(arguments.tasks))
    figures["activate in the store, ms"] = milliseconds(
        lambda: other_store.activate(TENANT, task_name(next(names)), {1: 1.0}), 100
    )
    figures["activate in the registry, ms"] = milliseconds(
        lambda: registry.activate(TENANT, task_name(next(names)), {1: 1.0}), 100
    )
    seen = threading.Event()
    registry.on_change(lambda old, new: seen.set() if old else None)

    def change_elsewhere() -> None:
        seen.clear()
        other_store.activate(TENANT, task_name(next(names)), {1: 1.0})
        seen.wait()

    figures["activate on another replica, seen after, ms"] = milliseconds(change_elsewhere, 50)
    figures["resolve, ms"] = milliseconds(
        lambda: registry.resolve(TENANT, task_name(next(names)), None, 0.5), 1000
    )
    registry.list(TENANT)
    figures["a page of the list, ms"] = milliseconds(
        lambda: registry.list(TENANT, cursor=task_name(arguments.tasks // 2)), 100
    )
    registry.close()
    store.close()
    other_store.close()
    return figures


class Prefixes:
    """Residency with a pool of the demo model's shape, driven as the engine does."""

    def __init__(self, store: Store, arguments: argparse.Namespace, *, threads: int) -> None:
        self.versions = [self._version(store, n) for n in range(arguments.prefixes)]
        pages = pages_for(arguments.tokens, PAGE_SIZE) * arguments.device_prefixes
        self.allocator = PageAllocator(pages, PAGE_SIZE)
        self.pool = KVPool(
            num_layers=GEOMETRY.num_layers,
            num_kv_heads=GEOMETRY.num_kv_heads,
            head_dim=GEOMETRY.head_dim,
            num_pages=pages,
            page_size=PAGE_SIZE,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.woken = threading.Event()
        self.engine_s: list[float] = []
        """what each load took from the engine's thread"""
        self.residency = Residency(
            store,
            self.allocator,
            self.pool,
            geometry=GEOMETRY,
            cache=CacheConfig(
                page_size=PAGE_SIZE,
                host_cache_bytes=0,
                max_device_prefixes=arguments.device_prefixes,
                load_threads=threads,
            ),
            wake=self.woken.set,
        )

    @staticmethod
    def _version(store: Store, number: int) -> PrefixVersion:
        record = store.get_task(TENANT, task_name(number)).version(1)
        tokens = record.num_virtual_tokens
        return PrefixVersion(TENANT, task_name(number), 1, record.sha256, tokens, tokens)

    def load(self, versions: Sequence[PrefixVersion]) -> None:
        """Have all of them on the device once, several on their way at a time."""
        residency, waiting = self.residency, list(versions)[::-1]
        going: list[PrefixVersion] = []
        spent = 0.0
        while waiting or going:
            self.woken.clear()
            start = time.perf_counter()
            while waiting and len(going) < 8:
                going.append(waiting.pop())
                residency.pin(going[-1])
            residency.poll()
            for version in list(going):
                lease = residency.acquire(version.key)
                if isinstance(lease, Lease):
                    lease.release()
                    residency.unpin(version.key)
                    going.remove(version)
            spent += time.perf_counter() - start
            if going:
                self.woken.wait()
        self.engine_s.append(spent / len(versions))


def measure_load(url: str, arguments: argparse.Namespace) -> Figures:
    figures: Figures = {}
    store = open_store(url)
    one = Prefixes(store, arguments, threads=1)
    version = one.versions[0]
    blob = store.read_blob(TENANT, version.sha256)
    figures["bytes of a prefix"] = str(len(blob))
    runs = 50
    figures["load: read and hash, ms"] = milliseconds(
        lambda: store.read_blob(TENANT, version.sha256), runs
    )
    figures["load: parse, ms"] = milliseconds(lambda: parse_prefix(blob), runs)
    arrays = parse_prefix(blob).arrays
    pages = range(pages_for(arguments.tokens, PAGE_SIZE))
    key, value = arrays["decoder.key"].data, arrays["decoder.value"].data
    figures["load: copy, ms"] = milliseconds(
        lambda: one.pool.write_prefix(pages, key, value, "float32"), runs
    )
    one.residency.close()
    for threads in arguments.load_threads:
        world = Prefixes(store, arguments, threads=threads)
        start = time.perf_counter()
        world.load(world.versions)
        rate = len(world.versions) / (time.perf_counter() - start)
        figures[f"loads a second, {threads} threads"] = f"{rate:.0f}"
        figures[f"engine thread a load, {threads} threads, ms"] = f"{world.engine_s[0] * 1e3:.3f}"
        world.residency.close()
    figures |= measure_disturbance(store, arguments)
    store.close()
    return figures


def measure_disturbance(store: Store, arguments: argparse.Namespace) -> Figures:
    """Steps (matrix products and Python, about STEP_S each) without loads and beside them."""
    figures: Figures = {}
    step = make_step()
    steps = arguments.steps
    figures["step, ms"] = percentiles(step, steps)
    for threads in arguments.load_threads:
        world = Prefixes(store, arguments, threads=threads)
        stop, loads = threading.Event(), [0]
        loader = threading.Thread(target=keep_loading, args=(world, arguments.rate, loads, stop))
        loader.start()
        start = time.perf_counter()
        figures[f"step beside loads, {threads} threads, ms"] = percentiles(step, steps)
        rate = loads[0] / (time.perf_counter() - start)
        stop.set()
        loader.join()
        figures[f"loads a second meanwhile, {threads} threads"] = f"{rate:.1f}"
    return figures


def keep_loading(world: Prefixes, rate: float, loads: list[int], stop: threading.Event) -> None:
    while not stop.is_set():
        world.load([world.versions[loads[0] % len(world.versions)]])
        loads[0] += 1
        stop.wait(1 / rate)


def make_step() -> Callable[[], None]:
    """A forward's mix: matrix products that release the GIL, and Python between them."""
    weight, rows = torch.randn(576, 1536), torch.randn(32, 576)

    def layers(count: int) -> None:
        for _ in range(count):
            (rows @ weight).sum()
            sum(range(500))

    layers(50)
    start = time.perf_counter()
    layers(50)
    count = max(1, int(50 * STEP_S / (time.perf_counter() - start)))
    return lambda: layers(count)


def percentiles(step: Callable[[], None], count: int) -> str:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return f"p50 {np.percentile(times, 50):.1f}, p99 {np.percentile(times, 99):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", choices=["disk", "redis"], nargs="+", default=["disk", "redis"])
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--prefixes", type=int, default=256, help="tasks with one of their own")
    parser.add_argument("--tokens", type=int, default=20, help="virtual tokens of those")
    parser.add_argument("--device-prefixes", type=int, default=64)
    parser.add_argument("--load-threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rate", type=float, default=20, help="loads a second beside the steps")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="where the stores are made; default: temporary")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    columns: dict[str, Figures] = {}
    for kind in arguments.store:
        folder = Path(tempfile.mkdtemp(prefix="prefixd-bench-", dir=arguments.folder))
        try:
            with fresh_store(kind, folder) as url:
                store = open_store(url)
                published = fill(store, folder, arguments)
                store.close()
                figures = {"publish, ms": f"{published * 1e3:.2f}"}
                figures |= measure_registry(url, arguments)
                columns[kind] = figures | measure_load(url, arguments)
        finally:
            shutil.rmtree(folder)
    title = f"{arguments.tasks} tasks, prefixes of {arguments.tokens} virtual tokens"
    table = Table("", *columns, title=title)
    for name in next(iter(columns.values())):
        table.add_row(name, *(figures[name] for figures in columns.values()))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
