"""Frozen linear layers, the packed product against oneDNN's: ``python bench/gemm.py``.

A pass multiplies with every weight of the model once, as a step does: the attention's three
projections joined, its output, gate and up joined, down, and the logits (of at most 128 rows). All
weights are distinct and larger than the caches, so a pass reads them all from memory. Both take
turns at each number of rows. ``PREFIXD_NATIVE_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2`` compares them
as on a CPU without AVX-512.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness.alternate import Case, take_turns
from harness.machine import describe
from harness.options import parser
from harness.report import Column, Report
from torch import Tensor

from prefixd_server.native import kernels
from prefixd_server.native.gemm import Gemm

Shape = tuple[int, int]
Linear = Callable[[Tensor], Tensor]

MODELS: dict[str, list[Shape]] = {
    "SmolLM2-135M": [(960, 576), (576, 576), (3072, 576), (576, 1536)] * 30 + [(49152, 576)],
    "two layers of Llama-3.2-1B": [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)] * 2,
}
"""[out, in] of each product, in order"""
SIZES = {"smoke": (3, (1, 32)), "full": (11, (1, 2, 4, 8, 16, 32, 64, 128, 256, 544, 1024))}
"""rounds, and numbers of rows"""
LOGITS, LOGITS_ROWS = 49152, 128
ONEDNN_ROWS = 128
"""that its weights are laid out for"""

COLUMNS = (
    Column("seconds", "ms a pass (least … most)", 1000, spread=True),
    Column("gb_per_s", "weights read, GB/s"),
    Column("gflops", "GFLOP/s"),
)


def ours(gemm: Gemm, weight: Tensor) -> Linear:
    packed = gemm.pack(weight)
    return lambda x: gemm.linear(x, packed)


def onednn(weight: Tensor) -> Linear:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ONEDNN_ROWS)
    linear = torch.ops.mkldnn._linear_pointwise
    return lambda x: linear(x, packed, None, "none", [], "")  # type: ignore[no-any-return]


def rows_of(shape: Shape, rows: int) -> int:
    return min(rows, LOGITS_ROWS) if shape[0] == LOGITS else rows


def run(linears: list[Linear], shapes: list[Shape], rows: int) -> dict[str, Any]:
    inputs = {(m, k): torch.randn(m, k) for n, k in shapes for m in (rows_of((n, k), rows),)}
    calls = [
        (linear, inputs[rows_of(shape, rows), shape[1]])
        for linear, shape in zip(linears, shapes, strict=True)
    ]
    start = time.perf_counter()
    for linear, x in calls:
        linear(x)
    seconds = time.perf_counter() - start
    flops = sum(2 * rows_of((n, k), rows) * n * k for n, k in shapes)
    read = sum(4 * n * k for n, k in shapes)
    return {"seconds": seconds, "gb_per_s": read / seconds / 1e9, "gflops": flops / seconds / 1e9}


@torch.inference_mode()
def compare(
    gemm: Gemm, shapes: list[Shape], rounds: int, sizes: tuple[int, ...]
) -> list[tuple[Case, Case]]:
    linears: dict[str, list[Linear]] = {"prefixd": [], "oneDNN": []}
    for shape in shapes:
        weight = torch.randn(shape)
        linears["prefixd"].append(ours(gemm, weight))
        linears["oneDNN"].append(onednn(weight))
    pairs = []
    for rows in sizes:
        mine, theirs = (
            Case(f"{name}, {rows} rows", partial(run, made, shapes, rows))
            for name, made in linears.items()
        )
        for case in (mine, theirs):
            case.run()
        take_turns([mine, theirs], rounds)
        pairs.append((mine, theirs))
    return pairs


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--model", choices=tuple(MODELS), default=next(iter(MODELS)))
    options_parser.add_argument("--rows", help="comma-separated; default: as the size has them")
    arguments = options_parser.parse_args()
    rounds, sizes = SIZES[arguments.size]
    if arguments.rows:
        sizes = tuple(map(int, arguments.rows.split(",")))
    torch.set_num_threads(arguments.threads)
    machine = describe(arguments.threads)
    loaded = kernels.load()
    assert loaded is not None, "there is no C++ compiler"
    pairs = compare(loaded.gemm, MODELS[arguments.model], rounds, sizes)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "none")
    settings = {"prefixd's instruction set": loaded.gemm.isa, "oneDNN's limit": limit}
    report = Report(
        "gemm",
        arguments.size,
        f"Products of {arguments.model}, float32; {rounds} rounds.",
        machine,
        settings,
        [case for pair in pairs for case in pair],
        COLUMNS,
    )
    for rows, (mine, theirs) in zip(sizes, pairs, strict=True):
        report.compare(f"{rows} rows: oneDNN's time ÷ prefixd's", theirs, mine, "seconds")
    report.publish(save=not arguments.no_save)


if __name__ == "__main__":
    main()
