"""What a prefix costs in training: tokens a second against the plain LM on the same batch.

    python bench/train_speed.py --model demo --virtual-tokens 10,100

The plain LM is transformers' own with SDPA and frozen weights, whose embeddings require a gradient
so that the backward runs through every layer. It computes its loss two ways: on all logits, as
``labels=`` does, and on those of the targets alone, as the trainer does. All are run in turn,
round after round, and the median of each is compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from prefixd_train.batching import IGNORED, Batch
from prefixd_train.lm import FrozenLM, load_lm
from prefixd_train.objective import negative_log_likelihood
from prefixd_train.parameterise import PrefixParameters, make_prefix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--source-tokens", type=int, default=96)
    parser.add_argument("--target-tokens", type=int, default=32)
    parser.add_argument("--virtual-tokens", default="10,100")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    lm = load_lm(options.model, dtype=options.dtype, device=options.device)
    batch = make_batch(options, lm)
    runs = plain_runs(lm, batch)
    for length in map(int, options.virtual_tokens.split(",")):
        for kind in ("direct", "mlp"):
            prefix = make_prefix(lm.shapes, {"decoder": length}, kind).to(lm.device)  # type: ignore[arg-type]
            runs[f"prefix of {length}, {kind}"] = prefix_run(lm, batch, prefix)
    seconds = measure(runs, lm, options.rounds)
    targets = batch.num_targets
    base = statistics.median(seconds["plain"])
    result = {
        "model": lm.name,
        "device": options.device,
        "dtype": options.dtype,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "batch": [options.batch_size, options.source_tokens, options.target_tokens],
        "runs": {
            name: {
                "target_tokens_per_s": round(targets / statistics.median(taken), 1),
                "of_plain": round(base / statistics.median(taken), 3),
                "seconds": [round(value, 4) for value in taken],
            }
            for name, taken in seconds.items()
        },
    }
    print(json.dumps(result, indent=1))


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
) -> dict[str, list[float]]:
    """Seconds of each run in each round; a first round is thrown away."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if lm.device.type == "cuda":
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in taken.items()}


if __name__ == "__main__":
    main()
