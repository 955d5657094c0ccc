"""Methods side by side on the same LM, data, steps and seeds. See bench/README.md.

    python bench/quality/run.py --size cpu --data DATA --out results

Each job is one line of results.jsonl under --out; one that is there is not run again, so a run may
be stopped and started at will. Several processes with the same --out share the jobs. `report.py`
makes the table and the charts.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bleu
import torch
from jobs import METHODS, SIZES, UNTRAINED, Job, chosen_lr
from loop import dev_loss, train
from methods import Base, FineTuning, InContext, Method, TopLayers, ZeroShot
from peers import Adapter, PeftPrefix, PeftPrompt
from prefixes import EmbeddingOnly, Infix, Prefix
from texts import Texts, load_texts

from prefixd_train.batching import Collator
from prefixd_train.scores import score_groups
from prefixd_train.testset import Segment, groups

KINDS: dict[str, Callable[[Base, Job, Texts], Method]] = {
    "zero-shot": ZeroShot,
    "in-context": InContext,
    "embedding-only": EmbeddingOnly,
    "infix-mlp-words": Infix,
    "peft-prefix": PeftPrefix,
    "peft-prompt": PeftPrompt,
    "peft-lora": Adapter,
    "peft-ia3": Adapter,
    "peft-loha": Adapter,
    "fine-tuning": FineTuning,
    "top-2-layers": TopLayers,
}
"""all others are `Prefix`"""


def run_job(job: Job, base: Base, data: Path, results: list[dict[str, Any]]) -> dict[str, Any]:
    texts = load_texts(job, data, base.tokenizer)
    collate = Collator.of(base.lm)
    torch.manual_seed(job.seed)
    method = KINDS.get(job.method, Prefix)(base, job, texts)
    found: dict[str, Any] = {
        "key": job.key,
        "job": asdict(job),
        "model": base.lm.name,
        "trained_parameters": sum(parameter.numel() for parameter in method.parameters()),
        "bytes_per_task": method.bytes_per_task(),
    }
    if job.method not in UNTRAINED:
        lr = chosen_lr(job, results)
        trained = train(
            method,
            texts.train,
            collate,
            steps=job.steps,
            batch_size=job.batch_size,
            lr=lr,
            seed=job.seed,
        )
        found |= {"lr": lr, "train_cpu_seconds": trained.cpu_seconds, "losses": trained.losses}
        found["dev_loss"] = dev_loss(method, texts.dev, collate)
    if job.num_test != 0:
        found |= _score(method, texts.test)
    return found


def _score(method: Method, test: list[Segment]) -> dict[str, Any]:
    start = time.perf_counter()
    outputs = method.generate([segment.prompt for segment in test])
    seconds = time.perf_counter() - start
    references = [segment.references for segment in test]
    scores = score_groups(outputs, references, groups(test))
    return {
        "generate_seconds": seconds,
        "scores": scores.as_json()["groups"],
        "signatures": scores.signatures,
        "bleu_statistics": bleu.statistics(outputs, references),
        "outputs": outputs,
    }


def read_results(folder: Path) -> list[dict[str, Any]]:
    path = folder / "results.jsonl"
    if not path.exists():
        return []
    with path.open() as file:
        return [json.loads(line) for line in file]


def selected(arguments: argparse.Namespace) -> list[Job]:
    unknown = set(arguments.only or ()) - set(METHODS)
    if unknown:
        raise SystemExit(f"unknown methods: {', '.join(sorted(unknown))}")
    jobs = SIZES[arguments.size].jobs
    if arguments.only:
        jobs = tuple(job for job in jobs if job.method in arguments.only)
    if arguments.seeds:
        jobs = tuple(job for job in jobs if job.seed in arguments.seeds)
    return list(jobs)


def main() -> None:
    arguments = _arguments()
    jobs = selected(arguments)
    results = read_results(arguments.out)
    todo = [job for job in jobs if job.key not in {result["key"] for result in results}]
    print(f"{len(jobs)} jobs, {len(todo)} to do", file=sys.stderr)
    if arguments.list or not todo:
        print("\n".join(job.key for job in todo))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with closing(Base(arguments.model, arguments.device)) as base:
        for number, job in enumerate(todo, 1):
            with claimed(arguments.out, job) as results:
                if results is None:
                    continue
                start = time.perf_counter()
                result = run_job(job, base, arguments.data, results) | _machine()
                result["seconds"] = time.perf_counter() - start
                with (arguments.out / "results.jsonl").open("a") as file:
                    file.write(json.dumps(result, ensure_ascii=False) + "\n")
            line = f"{number}/{len(todo)} {job.key}: {_line(result)}"
            print(line, file=sys.stderr, flush=True)
            # A method and its engine are in cycles; the next job needs their memory.
            gc.collect()


@contextmanager
def claimed(folder: Path, job: Job) -> Iterator[list[dict[str, Any]] | None]:
    """What has been found so far; None where the job is done or another process is at it."""
    path = folder / "claims" / job.key
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        results = read_results(folder)
        yield None if job.key in {result["key"] for result in results} else results


def _machine() -> dict[str, Any]:
    names = ("torch", "transformers", "peft", "sacrebleu", "rouge-score")
    return {
        "versions": {name: version(name) for name in names},
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def _line(result: dict[str, Any]) -> str:
    parts = [f"{result['seconds']:.0f} s"]
    parts += [f"dev {result['dev_loss']:.3f}"] if "dev_loss" in result else []
    if "scores" in result:
        parts.append(f"BLEU {result['scores']['all']['BLEU']['value']:.1f}")
    return ", ".join(parts)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sizes = "; ".join(f"{name}: {size.what}" for name, size in SIZES.items())
    parser.add_argument("--size", choices=SIZES, required=True, help=sizes)
    parser.add_argument("--data", type=Path, required=True, help="holds e2e/ and webnlg/")
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl")
    parser.add_argument("--model", default="demo", help="folder, hub id or demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", action="append", metavar="METHOD", help="repeatable")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--list", action="store_true", help="name what is to do and stop")
    return parser.parse_args()


if __name__ == "__main__":
    main()
