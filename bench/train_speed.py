"""What a prefix costs in training: tokens a second against the plain LM on the same batch.

    python bench/train_speed.py --model demo --virtual-tokens 10,100
    python bench/train_speed.py --model 1b --rounds 2    # random weights of Llama 3.2 1B's sizes

The plain LM is transformers' own with SDPA and frozen weights, whose embeddings require a gradient
so that the backward runs through every layer. It computes its loss two ways: on all logits, as
``labels=`` does, and on those of the targets alone, as the trainer does. All are run in turn,
round after round, and the median of each is compared. Memory is the most that a run held beyond
what there was before it, so without the weights: activations and gradients.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness.geometry import GEOMETRIES
from harness.machine import describe
from harness.memory import status_bytes
from harness.report import RAW
from torch import Tensor
from transformers import AutoModelForCausalLM

from prefixd_train.batching import IGNORED, Batch
from prefixd_train.lm import FrozenLM, load_lm
from prefixd_train.objective import negative_log_likelihood
from prefixd_train.parameterise import PrefixParameters, make_prefix

CLEAR_REFS, PEAK = Path("/proc/self/clear_refs"), "5"


class Taken(NamedTuple):
    seconds: float
    bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="demo", help=f"folder, hub id, demo, or random: {', '.join(GEOMETRIES)}"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--source-tokens", type=int, default=96)
    parser.add_argument("--target-tokens", type=int, default=32)
    parser.add_argument("--virtual-tokens", default="10,100")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-save", action="store_true", help="print only, append to no file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(options, random_model(options, Path(folder) / options.model))
    print(json.dumps(result, indent=1))
    if not options.no_save:
        with (RAW / "train_speed.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")


def random_model(options: argparse.Namespace, folder: Path) -> str:
    """The folder of random weights in one of GEOMETRIES, made now; or the name that was given."""
    if options.model not in GEOMETRIES:
        return str(options.model)
    demo = load_lm("demo")
    config = GEOMETRIES[options.model].config(tied=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    demo.tokenizer.save_pretrained(folder)
    return str(folder)


def run(options: argparse.Namespace, model: str) -> dict[str, object]:
    machine = describe(torch.get_num_threads())
    lm = load_lm(model, dtype=options.dtype, device=options.device)
    batch = make_batch(options, lm)
    runs = plain_runs(lm, batch)
    for length in map(int, options.virtual_tokens.split(",")):
        for kind in ("direct", "mlp"):
            prefix = make_prefix(lm.shapes, {"decoder": length}, kind).to(lm.device)  # type: ignore[arg-type]
            runs[f"prefix of {length}, {kind}"] = prefix_run(lm, batch, prefix)
    taken = measure(runs, lm, options.rounds)
    targets = batch.num_targets
    seconds = {name: statistics.median(one.seconds for one in some) for name, some in taken.items()}
    return {
        "model": options.model,
        "parameters": sum(parameter.numel() for parameter in lm.module.parameters()),
        "device": options.device,
        "dtype": options.dtype,
        "machine": machine,
        "batch": [options.batch_size, options.source_tokens, options.target_tokens],
        "runs": {
            name: {
                "target_tokens_per_s": round(targets / seconds[name], 1),
                "of_plain": round(seconds["plain"] / seconds[name], 3),
                "seconds": [round(one.seconds, 4) for one in some],
                "peak_mib": round(statistics.median(one.bytes for one in some) / 2**20),
            }
            for name, some in taken.items()
        },
    }


def make_batch(options: argparse.Namespace, lm: FrozenLM) -> Batch:
    torch.manual_seed(0)
    length = options.source_tokens + options.target_tokens
    vocab = lm.module.get_output_embeddings().weight.shape[0]
    ids = torch.randint(10, vocab, (options.batch_size, length))
    labels = ids.clone()
    labels[:, : options.source_tokens] = IGNORED
    return Batch(ids, torch.ones_like(ids), labels).to(lm.device)


def plain_runs(lm: FrozenLM, batch: Batch) -> dict[str, Callable[[], None]]:
    module = AutoModelForCausalLM.from_pretrained(lm.folder, dtype=lm.dtype)
    module = module.to(lm.device).eval().requires_grad_(False)
    module.get_input_embeddings().register_forward_hook(
        lambda _, inputs, output: output.requires_grad_()
    )
    shifted = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED).flatten()
    rows = (shifted != IGNORED).nonzero()[:, 0]

    def choose(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].flatten(0, 1).index_select(0, rows)[None],)

    def plain() -> None:
        module(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            use_cache=False,
        ).loss.backward()

    def plain_targets() -> None:
        handle = module.get_output_embeddings().register_forward_pre_hook(choose)
        logits = module(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits
        handle.remove()
        F.cross_entropy(logits[0].float(), shifted[rows]).backward()

    return {"plain": plain, "plain, logits of targets": plain_targets}


def prefix_run(lm: FrozenLM, batch: Batch, prefix: PrefixParameters) -> Callable[[], None]:
    def run() -> None:
        prefix.zero_grad()
        loss, num_targets = negative_log_likelihood(lm, batch, prefix())
        (loss / num_targets).backward()

    return run


def measure(
    runs: dict[str, Callable[[], None]], lm: FrozenLM, rounds: int
) -> dict[str, list[Taken]]:
    """Of each run in each round; a first round is thrown away."""
    taken: dict[str, list[Taken]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            before = start_peak(lm.device)
            start = time.perf_counter()
            run()
            if lm.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            taken[name].append(Taken(seconds, peak(lm.device) - before))
    return {name: values[1:] for name, values in taken.items()}


def start_peak(device: torch.device) -> int:
    """Bytes in use; the peak is counted from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # What earlier runs freed is not yet the system's.
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text(PEAK)
    return status_bytes("VmRSS")


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else status_bytes("VmHWM")


if __name__ == "__main__":
    main()
