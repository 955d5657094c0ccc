"""bench/cuda_steps.py on a toy model on the CPU: that it runs, and what it counts."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench" / "cuda_steps.py"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("bench_cuda", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    sys.modules[spec.name] = module  # dataclasses look their module up
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH.parent))
        spec.loader.exec_module(module)
    yield module
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in (spec.name, "cuda_whole", "harness"):
            del sys.modules[name]


def test_a_tiny_run_writes_its_table_and_its_json(bench: ModuleType, tmp_path: Path) -> None:
    table, figures = tmp_path / "results.md", tmp_path / "figures.json"
    bench.main(["--tiny", "--device", "cpu", f"--results={table}", f"--json={figures}"])
    report = json.loads(figures.read_text())
    kinds = [
        (dtype, shape) for dtype in ("float32", "bfloat16") for shape in ("1 × 700", "3 × 100")
    ]
    assert report["errors"].keys() == {f"sdpa, {dtype}, {shape}" for dtype, shape in kinds}
    cases = {(r["case"], r["load"]["batch"], r["load"]["tasks"]) for r in report["results"]}
    assert {("sdpa", 3, 0), ("sdpa", 3, 1), ("sdpa", 3, 3), ("transformers generate", 3, 0)} < cases
    assert ("engine", 3, 0) in cases
    assert all(r["step_ms"] > 0 and r["floor_ms"] > 0 for r in report["results"])
    assert "speed of a large copy" in table.read_text()
    rows = [line for line in table.read_text().splitlines() if line.startswith("| tiny |")]
    assert len(rows) == len(report["results"])


def test_the_floor_counts_weights_once_and_each_prefix_once(bench: ModuleType) -> None:
    geometry = bench.GEOMETRIES["8b"]
    with torch.device("meta"):
        module = bench.AutoModelForCausalLM.from_config(geometry.config())
    base = bench.floor_bytes(module, geometry, bench.Load(1, 0, 0, 0), torch.bfloat16)
    row = 2 * 32 * 8 * 128 * 2
    assert base == pytest.approx(7.5e9 * 2, rel=0.01)
    shared = bench.floor_bytes(module, geometry, bench.Load(32, 512, 1, 99), torch.bfloat16)
    assert shared - base == (512 + 32 * 100 - 1) * row


def test_every_batch_is_run_without_with_one_and_with_many_prefixes(bench: ModuleType) -> None:
    loads = bench.loads_of(bench.parse(["--batches", "32", "--prefix", "64"]))
    assert [(load.prefix, load.tasks) for load in loads] == [(0, 0), (64, 1), (64, 32)]
    with pytest.raises(SystemExit):
        bench.parse(["--models", "70b"])


def test_a_batch_without_its_graph_is_not_called_one(bench: ModuleType) -> None:
    pytest.importorskip("triton")
    cpu, geometry = torch.device("cpu"), bench.GEOMETRIES["tiny"]
    module = bench.make_module(geometry, cpu, torch.float32)
    grouped, apart = (
        bench.Batch(module, geometry, bench.Load(3, 4096, tasks, 5), cpu) for tasks in (1, 3)
    )
    runner = bench.CudaGraphRunner(
        module, bench.create_backend("triton", apart.pool), cpu, max_num_seqs=4
    )
    assert not runner.replays(apart.step)
    runner.make_steps([4])
    assert runner.replays(apart.step)
    assert runner.replays(grouped.step)
    del runner.steps[4, True]
    assert not runner.replays(grouped.step)
