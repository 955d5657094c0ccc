"""Tokens per second of prefixd and of what one would use without it: ``python bench/serve.py``.

The workload: 32 requests at once, each of another task (prefixes of 20 virtual tokens), greedy, of
a fixed length. prefixd runs it without HTTP (the engine alone) and with (a server, streaming).
All cases take turns in every round, so that a machine that gets slower does so for all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
from peers import Job, Peers
from report import Case, machine, report
from rich.console import Console

from prefixd import Client
from prefixd_server.config import CacheConfig, Config, ModelConfig, StoreConfig
from prefixd_server.models.demo import demo_model_folder
from prefixd_server.types import EngineRequest, FinishReason, Output, SamplingParams
from prefixd_server.wiring import Server
from prefixd_store import PrefixArray, write_prefix

NUM_TASKS = 32
NUM_VIRTUAL_TOKENS = 20


class Size(NamedTuple):
    rounds: int
    new_tokens: int
    peft_tasks: int
    """PEFT runs one task after another, so its rate does not depend on how many there are."""


SIZES = {"smoke": Size(2, 32, 2), "full": Size(5, 64, 8)}
PROMPTS = [
    f"Write one sentence about the number {n} and a place called Blue Spice." for n in range(32)
]


# --- the workload ---------------------------------------------------------------------------------


def jobs(tasks: Sequence[str | None]) -> list[Job]:
    return [Job(task, prompt) for task, prompt in zip(tasks, PROMPTS, strict=False)]


def task_names() -> list[str]:
    return [f"task-{n}" for n in range(NUM_TASKS)]


def write_prefixes(server: Server, folder: Path) -> list[Path]:
    """One random prefix a task, as large as real ones are."""
    geometry = server.model.geometry
    shape = (geometry.num_layers, geometry.num_kv_heads, NUM_VIRTUAL_TOKENS, geometry.head_dim)
    paths: list[Path] = []
    for name in task_names():
        random = np.random.default_rng(len(paths))
        key, value = random.normal(scale=0.5, size=(2, *shape)).astype(np.float32)
        path = folder / f"{name}.safetensors"
        tensors = {"decoder.key": PrefixArray.of(key), "decoder.value": PrefixArray.of(value)}
        write_prefix(path, tensors, query_offset=NUM_VIRTUAL_TOKENS)
        paths.append(path)
    return paths


# --- prefixd --------------------------------------------------------------------------------------


def run_engine(server: Server, work: Sequence[Job], new_tokens: int) -> int:
    """Submit to the mailbox and wait for the last output: no HTTP, no text."""
    requests = [_engine_request(server, job, number, new_tokens) for number, job in enumerate(work)]
    waiting = {request.request_id for request in requests}
    tokens = 0
    done = threading.Event()

    def deliver(outputs: Sequence[Output]) -> None:
        nonlocal tokens
        for output in outputs:
            tokens += len(output.tokens)
            if output.finish is not None and output.finish.reason is FinishReason.LENGTH:
                waiting.remove(output.request_id)
        if not waiting or any(output.finish and output.finish.error for output in outputs):
            done.set()

    server.mailbox.deliver = deliver
    server.mailbox.submit(requests)
    done.wait()
    assert not waiting, "a request failed"
    return tokens


def _engine_request(server: Server, job: Job, number: int, new_tokens: int) -> EngineRequest:
    ids = server.model.tokenizer(job.prompt)["input_ids"]
    return EngineRequest(
        request_id=f"bench-{number}",
        tenant="default",
        task=job.task,
        version=None,
        prompt_token_ids=tuple(ids),
        sampling=SamplingParams(max_new_tokens=new_tokens, ignore_eos=True),
        deadline=time.monotonic() + 600,
        arrival=time.monotonic(),
    )


@contextmanager
def server_process(store: Path, threads: int) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = [f"--store={store}", f"--port={port}", f"--threads={threads}", "--log-level=error"]
    command = [sys.executable, "-m", "prefixd", "serve", "--model=demo", "--dtype=float32"]
    process = subprocess.Popen([*command, "--device=cpu", "--no-prompt-cache", *options])
    url = f"http://127.0.0.1:{port}"
    try:
        with Client(url) as client:
            while not _is_ready(client):
                assert process.poll() is None, "the server ended"
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def _is_ready(client: Client) -> bool:
    try:
        return client.ready().status == "ready"
    except Exception:
        return False


def run_http(url: str, work: Sequence[Job], new_tokens: int) -> int:
    return asyncio.run(_run_http(url, work, new_tokens))


async def _run_http(url: str, work: Sequence[Job], new_tokens: int) -> int:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        return sum(await asyncio.gather(*(_stream(client, job, new_tokens) for job in work)))


async def _stream(client: httpx.AsyncClient, job: Job, new_tokens: int) -> int:
    body = {
        "inputs": job.prompt,
        "parameters": {"max_new_tokens": new_tokens, "ignore_eos": True},
        "stream": True,
    }
    path = f"/v1/tasks/{job.task or 'base'}/generate"
    async with client.stream("POST", path, json=body) as answer:
        answer.raise_for_status()
        events = [line async for line in answer.aiter_lines() if line.startswith("data:")]
    assert len(events) == new_tokens
    return len(events)


# --- the run --------------------------------------------------------------------------------------


def make_cases(server: Server, url: str, peers: Peers, size: Size) -> list[Case]:
    names = task_names()
    many, same, base = jobs(names), jobs([names[0]] * NUM_TASKS), jobs([None] * NUM_TASKS)
    engine = partial(run_engine, server, new_tokens=size.new_tokens)
    over_http = partial(run_http, url, new_tokens=size.new_tokens)
    static = partial(peers.run_static_batch, new_tokens=size.new_tokens)
    return [
        Case("engine, 32 tasks", partial(engine, many)),
        Case("engine, 32 requests of one task", partial(engine, same)),
        Case("engine, 32 requests of the base model", partial(engine, base)),
        Case("engine, one request", partial(engine, many[:1])),
        Case("HTTP streams, 32 tasks", partial(over_http, many)),
        Case("HTTP streams, 32 requests of one task", partial(over_http, same)),
        Case("HTTP stream, one request", partial(over_http, many[:1])),
        Case("transformers, base model, static batch of 32", partial(static, PROMPTS)),
        Case("transformers, base model, one request", partial(static, PROMPTS[:1])),
        Case(
            "PEFT, one task after another",
            partial(
                peers.run_one_after_another, many[: size.peft_tasks], new_tokens=size.new_tokens
            ),
        ),
    ]


def measure(size: Size, threads: int, folder: Path) -> list[Case]:
    config = Config(
        model=ModelConfig(device="cpu", dtype="float32", threads=threads),
        store=StoreConfig(store=str(folder / "store")),
        # The same prompts come again and again; all of their tokens are to be computed each time.
        cache=CacheConfig(prompt_cache=False),
    )
    model_folder = demo_model_folder(Path(config.model.cache_dir).expanduser())
    server = Server(config)
    server.start()
    try:
        with server_process(folder / "store", threads) as url:
            adapters = upload(url, write_prefixes(server, folder), size, folder)
            peers = Peers(model_folder, adapters)
            # A short round loads prefixes and fills allocators' caches.
            for case in make_cases(server, url, peers, size._replace(new_tokens=2)):
                case.run()
            cases = make_cases(server, url, peers, size)
            for number in range(size.rounds):
                for case in cases:
                    Console(stderr=True).print(f"round {number + 1}: {case.name}", style="dim")
                    case.measure()
            return cases
    finally:
        server.close()


def upload(url: str, prefixes: Sequence[Path], size: Size, folder: Path) -> dict[str, Path]:
    """Push all; the first few come back as the PEFT folders that the peer loads."""
    with Client(url) as client:
        for path in prefixes:
            client.push(path.stem, path)
        return {
            path.stem: client.pull(path.stem, folder / f"peft-{path.stem}", format="peft")
            for path in prefixes[: size.peft_tasks]
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="smoke")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    where = machine(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        cases = measure(size, arguments.threads, Path(folder))
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    title = f"{date}, {arguments.size}: {size.new_tokens} tokens, {size.rounds} rounds"
    report(cases, title, where)


if __name__ == "__main__":
    main()
