"""A CUDA device: right first, then how near its memory's speed. ``python bench/cuda_steps.py``

Decode is bound by memory: a step must read all weights once and the KV of its sequences. Those
bytes over the speed of a large copy, measured here, is about the least a step can take (reading
alone may be a little faster than copying); each case is reported as a share of it. Weights are
random, so nothing is downloaded; the geometries are those of Llama 3. ``engine`` is the whole
engine, with scheduling, sampling and the hand-over of tokens. Peers are transformers' ``generate``
on the same module and, where it is installed, vLLM. These three have no steps to time: a step is
what 64 more tokens take, over 64.

Not ``cuda.py``: scripts here have this folder on their path, and torch imports NVIDIA's ``cuda``.

``--tiny --device cpu`` runs all of it on a toy model, to see that the script works.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from cuda_whole import PAGE_SIZE, engine_ms, generate_ms, synchronize, vllm_ms
from harness.geometry import GEOMETRIES, Geometry
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from prefixd_server.attention import create_backend, interface
from prefixd_server.engine.cuda_graphs import CudaGraphRunner, bucket_sizes
from prefixd_server.engine.runner import ModelRunner
from prefixd_server.engine.scheduler import Scheduled
from prefixd_server.engine.sequence import Sequence as Running
from prefixd_server.kv.allocator import pages_for
from prefixd_server.kv.pool import KVPool
from prefixd_server.prefix.entry import Lease
from prefixd_server.types import EngineRequest, PrefixVersion, SamplingParams

RESULTS = Path(__file__).with_name("RESULTS-cuda.md")


@dataclass(frozen=True)
class Load:
    """Decodes in one batch: own tokens, and a prefix of one of so many tasks."""

    batch: int
    prefix: int
    tasks: int
    context: int


@dataclass
class Result:
    model: str
    case: str
    load: Load
    step_ms: float
    floor_ms: float
    tokens_per_s: float

    @property
    def share(self) -> float:
        return self.floor_ms / self.step_ms


# --- the device -----------------------------------------------------------------------------------


def median_ms(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of one run, host and device together; three to warm up."""
    for _ in range(3):
        run()
    found = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        found.append((time.perf_counter() - start) * 1e3)
    return statistics.median(found)


def memory_bytes_per_s(device: torch.device, size: int) -> float:
    """Of a copy from memory to memory, counting what it reads and what it writes."""
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (median_ms(lambda: target.copy_(source), device, 10) / 1e3)


# --- a batch of decodes ---------------------------------------------------------------------------


class PagesOnly(NamedTuple):
    """What a step wants of a lease; there is no residency to give it back to."""

    pages: list[int]


class Batch:
    """Sequences in the midst of decoding, over a pool of noise; ``step`` runs one token of each."""

    def __init__(self, module: Any, geometry: Geometry, load: Load, device: torch.device) -> None:
        prefix_pages = pages_for(load.prefix, PAGE_SIZE)
        own_pages = pages_for(load.context + 1, PAGE_SIZE)
        dtype = next(module.parameters()).dtype
        self.pool = KVPool(
            num_layers=geometry.layers,
            num_kv_heads=geometry.kv_heads,
            head_dim=geometry.hidden // geometry.heads,
            num_pages=load.tasks * prefix_pages + load.batch * own_pages,
            page_size=PAGE_SIZE,
            dtype=dtype,
            device=device,
        )
        self.tensors = [*self.pool.keys, *self.pool.values]
        for tensor in self.tensors:
            tensor.normal_()
        pages = iter(torch.randperm(self.pool.num_pages).tolist())
        prefixes = [[next(pages) for _ in range(prefix_pages)] for _ in range(load.tasks)]
        self.step = [
            Scheduled(
                _decoding(i, load, prefixes, [next(pages) for _ in range(own_pages)], geometry), 1
            )
            for i in range(load.batch)
        ]


def _decoding(
    number: int, load: Load, prefixes: list[list[int]], pages: list[int], geometry: Geometry
) -> Running:
    prompt = tuple(torch.randint(0, geometry.vocab, (load.context + 1,)).tolist())
    request = EngineRequest(f"r{number}", "t", None, None, prompt, SamplingParams(), 0.0)
    prefix, task = None, number % max(1, load.tasks)
    if load.prefix:
        prefix = PrefixVersion("t", f"p{task}", 1, f"{task}", load.prefix, load.prefix)
    sequence = Running(request, prompt, prefix)
    sequence.pages, sequence.num_computed = pages, load.context
    if load.prefix:
        sequence.lease = cast(Lease, PagesOnly(prefixes[task]))
    return sequence


def floor_bytes(module: Any, geometry: Geometry, load: Load, dtype: torch.dtype) -> int:
    """Weights but for the rows of the embedding, and keys and values: each prefix once."""
    embedding = module.get_input_embeddings().weight
    weights = sum(p.numel() for p in module.parameters()) - embedding.numel()
    tokens = load.tasks * load.prefix + load.batch * (load.context + 1)
    row = 2 * geometry.layers * geometry.kv_heads * (geometry.hidden // geometry.heads)
    return int((weights + tokens * row) * dtype.itemsize)


# --- cases ----------------------------------------------------------------------------------------


def make_module(geometry: Geometry, device: torch.device, dtype: torch.dtype) -> Any:
    interface.register()
    torch.manual_seed(0)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(geometry.config(), dtype=dtype)
    module.set_attn_implementation(interface.IMPLEMENTATION)
    return module.eval().requires_grad_(False)


def runners(module: Any, batch: Batch, device: torch.device) -> dict[str, ModelRunner]:
    found = {"sdpa": ModelRunner(module, create_backend("sdpa", batch.pool), device)}
    if device.type == "cuda":
        paged = create_backend("triton", batch.pool)
        found["triton"] = ModelRunner(module, paged, device)
        graphs = CudaGraphRunner(module, paged, device, max_num_seqs=len(batch.step))
        graphs.capture(bucket_sizes(len(batch.step))[:1])
        # Without a graph for this batch it would be the row above under another name.
        name = "triton, graphs" if graphs.replays(batch.step) else "triton, no graph captured"
        found[name] = graphs
    return found


CHECKED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""the largest relative error, by what is computed in"""


def check(device: torch.device) -> dict[str, float]:
    """Each runner's relative error on a small model, against the reference's on the CPU in float32
    with the same weights, keys and values; with a prefix that is read by its group, and apart.

    Raises if one is wrong: figures of a wrong kernel mean nothing.
    """
    grouped = Load(batch=9, prefix=700, tasks=1, context=70)
    apart = Load(batch=9, prefix=100, tasks=3, context=70)
    errors = {}
    for dtype, tolerance in CHECKED.items():
        for load in (grouped, apart):
            for name, error in _errors(load, dtype, device).items():
                case = f"{name}, {str(dtype).removeprefix('torch.')}, {load.tasks} × {load.prefix}"
                errors[case] = error
                if not error < tolerance:
                    raise SystemExit(f"{case} is wrong: relative error {error:.2g}")
    return errors


def _errors(load: Load, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    geometry, cpu = GEOMETRIES["tiny"], torch.device("cpu")
    module = make_module(geometry, cpu, dtype)
    batch = Batch(module, geometry, load, cpu)
    exact = make_module(geometry, cpu, torch.float32)
    exact.load_state_dict(module.state_dict())
    reference, checked = (
        Batch(model, geometry, load, where) for model, where in ((exact, cpu), (module, device))
    )
    for other in (reference, checked):
        other.step = batch.step
        for mine, theirs in zip(batch.tensors, other.tensors, strict=True):
            theirs.copy_(mine)
    backend = create_backend("sdpa", reference.pool)
    wanted = ModelRunner(exact, backend, cpu).run(batch.step).next_token
    return {
        name: _error(runner.run(batch.step).next_token.float(), wanted)
        for name, runner in runners(module.to(device), checked, device).items()
    }


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.cpu() - wanted).norm() / wanted.norm())


def measure(
    name: str, loads: Sequence[Load], device: torch.device, speed: float, repeats: int
) -> list[Result]:
    geometry = GEOMETRIES[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    module = make_module(geometry, device, dtype)
    results = []

    def note(case: str, load: Load, step_ms: float) -> None:
        floor = floor_bytes(module, geometry, load, dtype) / speed * 1e3
        rate = load.batch / step_ms * 1e3
        results.append(Result(name, case, load, step_ms, floor, rate))
        Console(stderr=True).print(f"{name} {case} {load}: {step_ms:.2f} ms", style="dim")

    for load in loads:
        for case, step_ms in _steps_ms(module, geometry, load, device, repeats).items():
            note(case, load, step_ms)
        _free(device)
        base = Load(load.batch, 0, 0, load.context)
        if not load.prefix:
            note("transformers generate", base, generate_ms(module, base, device))
            _free(device)
            case, step_ms = engine_ms(module, base, device)
            note(case, base, step_ms)
            _free(device)
    for load, step_ms in vllm_ms(module, [load for load in loads if not load.prefix], device):
        note("vLLM", load, step_ms)
    return results


def _steps_ms(
    module: Any, geometry: Geometry, load: Load, device: torch.device, repeats: int
) -> dict[str, float]:
    batch = Batch(module, geometry, load, device)
    return {
        case: median_ms(partial(runner.run, batch.step), device, repeats)
        for case, runner in runners(module, batch, device).items()
        # The reference gathers all keys; small batches tell enough of it.
        if case != "sdpa" or device.type == "cpu" or load.batch <= 32
    }


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- the report -----------------------------------------------------------------------------------

FLOOR = (
    "The floor: weights, and keys and values, read once at the speed of a large copy, both ways"
    " counted."
)


def markdown(title: str, results: Sequence[Result]) -> str:
    lines = [
        f"\n## {title}\n",
        FLOOR + "\n",
        "| model | case | batch | tasks × virtual tokens | context |",
    ]
    lines[-1] += " ms a step | floor, ms | of the floor's speed | tokens/s |"
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    lines += [
        f"| {r.model} | {r.case} | {r.load.batch} | {r.load.tasks} × {r.load.prefix} |"
        f" {r.load.context} | {r.step_ms:.2f} | {r.floor_ms:.2f} | {r.share:.0%} |"
        f" {r.tokens_per_s:.0f} |"
        for r in results
    ]
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--models", nargs="+", choices=GEOMETRIES, default=["1b", "8b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 128, 256])
    parser.add_argument("--prefix", type=int, default=512, help="virtual tokens of a task")
    parser.add_argument("--context", type=int, default=256, help="own tokens of a sequence")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="a toy model, small batches")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="append the table to this")
    found = parser.parse_args(arguments)
    if found.tiny:
        found.models, found.batches, found.prefix = ["tiny"], [1, 3], 40
        found.context, found.repeats = 20, 2
    return found


def loads_of(options: argparse.Namespace) -> list[Load]:
    """Without a prefix, one task for all, a task each."""
    loads = []
    for batch in options.batches:
        kinds = {(0, 0), (options.prefix, 1), (options.prefix, batch)}
        loads += [Load(batch, prefix, tasks, options.context) for prefix, tasks in sorted(kinds)]
    return loads


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device(options.device)
    errors = check(device)
    speed = memory_bytes_per_s(device, 1 << (22 if options.tiny else 30))
    results: list[Result] = []
    for name in options.models:
        results += measure(name, loads_of(options), device, speed, options.repeats)
        _free(device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    title = f"{time.strftime('%Y-%m-%d')}, {where}, torch {torch.__version__}"
    title += f", a copy moves {speed / 1e9:.0f} GB/s"
    table = markdown(title, results)
    print(table)
    if not options.results.exists():
        options.results.write_text("# Results of bench/cuda_steps.py, newest last\n")
    with options.results.open("a") as file:
        file.write(table)
    if options.json is not None:
        rows = [asdict(result) | {"share": result.share} for result in results]
        report = {"title": title, "errors": errors, "bytes_per_s": speed, "results": rows}
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
