"""How near a cartridge comes to the document that it was distilled from. See bench/README.md.

    python bench/quality/cartridge.py --size cpu --out OUT

The LM with the document in its context answers questions that no prefix was trained on. What other
contexts than the document make of these answers is measured token by token: KL(LM with the document
‖ LM with that context), the perplexity of the answers, how often the likeliest token is the same.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from prefixd_train.batching import Collator
from prefixd_train.bootstrap import draw, interval
from prefixd_train.data import Examples
from prefixd_train.distill import Lesson, read_lesson
from prefixd_train.initialise import activations_of_tokens, from_tokens
from prefixd_train.inject import target_logits
from prefixd_train.lm import FrozenLM, load_lm
from prefixd_train.loop import Trainer
from prefixd_train.options import TrainOptions
from prefixd_train.progress import Reporter
from prefixd_train.questions import Question, read_questions, write_questions
from prefixd_train.sites import PrefixKV
from prefixd_train.start import start_prefix
from prefixd_train.teacher import Teacher, write_teacher

ROOT = Path(__file__).parents[2]
BATCH_SIZE = 8


class Size(NamedTuple):
    lengths: tuple[int, ...]
    generated: int
    """questions that the LM writes, held-out ones included"""
    held_out: int
    written: int | None
    """questions of the file that are asked; None: all"""
    steps: int
    chunk_tokens: int = 256
    answer_tokens: int = 32


SIZES = {
    "smoke": Size((8,), 4, 2, 2, 2, answer_tokens=4),
    "cpu": Size((64, 128), 90, 12, None, 60),
    "gpu": Size((64, 128, 256, 512), 2000, 100, None, 2000, chunk_tokens=512, answer_tokens=64),
}


class Held(NamedTuple):
    """Questions that are not trained on, with the answers of the LM that has the document."""

    name: str
    examples: Examples


def ask(
    options: TrainOptions, lm: FrozenLM, lesson: Lesson, size: Size, written: Path, folder: Path
) -> tuple[Teacher, list[Held]]:
    """The teacher of those to train on, and two sets to score: more that the LM wrote, and ours."""
    found = write_questions(
        lm,
        lesson.document,
        size.generated,
        lesson.encoder,
        chunk_tokens=size.chunk_tokens,
        answer_tokens=size.answer_tokens,
        seed=options.seed,
    )
    own = list({question.prompt: question for question in found}.values())
    ours = read_questions(written, lesson.encoder, answer_tokens=size.answer_tokens)
    document = activations_of_tokens(lm, lesson.document)

    def answered(name: str, questions: Sequence[Question]) -> Teacher:
        write_teacher(
            folder / name,
            lm,
            document,
            questions,
            top_k=options.top_k,
            answer_tokens=size.answer_tokens,
            batch_size=BATCH_SIZE,
        )
        return Teacher(folder / name)

    return answered("train", own[size.held_out :]), [
        Held("generated", answered("generated", own[: size.held_out]).examples),
        Held("written", answered("written", ours[: size.written]).examples),
    ]


def distil(
    options: TrainOptions, lm: FrozenLM, document: Sequence[int], teacher: Teacher
) -> tuple[PrefixKV, float]:
    """The trained keys and values, and seconds."""
    torch.manual_seed(options.seed)
    lengths = {"decoder": options.num_virtual_tokens}
    prefix = start_prefix(options, lm, lengths, teacher.examples, document=document)
    reporter = Reporter(Console(stderr=True), log_every=options.log_every)
    start = time.perf_counter()
    Trainer(
        lm, prefix, teacher.examples, options, objective=teacher.divergence, reporter=reporter
    ).run()
    prefix.eval()
    with torch.no_grad():
        return prefix(), time.perf_counter() - start


@torch.no_grad()
def measure(
    lm: FrozenLM, examples: Examples, document: PrefixKV, contexts: Mapping[str, PrefixKV | None]
) -> dict[str, NDArray[np.float64]]:
    """For each context ``[questions, 4]``: the sums over an answer's tokens of KL, of -log p and of
    whether the likeliest token is the document's, and the number of tokens."""
    collate = Collator.of(lm)
    rows: dict[str, list[NDArray[np.float64]]] = {name: [] for name in contexts}
    for start in range(0, len(examples), BATCH_SIZE):
        some = range(start, min(start + BATCH_SIZE, len(examples)))
        batch = collate([examples[index] for index in some]).to(lm.device)
        told, targets, owners = target_logits(lm, batch, document)
        teacher = told.float().log_softmax(1)
        for name, context in contexts.items():
            student = target_logits(lm, batch, context).logits.float().log_softmax(1)
            figures = torch.stack(
                [
                    (teacher.exp() * (teacher - student)).sum(1),
                    -student.gather(1, targets[:, None])[:, 0],
                    (teacher.argmax(1) == student.argmax(1)).float(),
                    torch.ones_like(targets, dtype=torch.float32),
                ],
                1,
            ).double()
            sums = figures.new_zeros(len(some), 4).index_add_(0, owners, figures)
            rows[name].append(sums.cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def figures(statistics: NDArray[np.float64]) -> dict[str, float]:
    kl, nll, same, tokens = statistics.sum(0)

    def mean_kl(sums: NDArray[np.float64]) -> float:
        return float(sums[0] / sums[3])

    low, high = interval(statistics, mean_kl, draw(len(statistics), 1000, seed=0))
    return {
        "questions": len(statistics),
        "tokens": int(tokens),
        "kl": float(kl / tokens),
        "kl_low": low,
        "kl_high": high,
        "perplexity": float(np.exp(nll / tokens)),
        "same_token": float(same / tokens),
    }


def run(options: TrainOptions, size: Size, written: Path, out: Path) -> Iterator[dict[str, Any]]:
    """A line for each context: no context, parts of the document, cartridges, the document."""
    lm = load_lm(options.model, device=options.device)
    lesson = read_lesson(options, lm, {"decoder": max(size.lengths)})
    teacher, held = ask(options, lm, lesson, size, written, out)
    tokens = lesson.document
    document = activations_of_tokens(lm, tokens)
    contexts: dict[str, PrefixKV | None] = {"nothing": None}
    told: dict[str, dict[str, Any]] = {}
    for length in size.lengths:
        lengths = {"decoder": length}
        contexts[f"first {length} tokens"] = from_tokens(lm, tokens, lengths)
        contexts[f"{length} tokens of all"] = from_tokens(lm, tokens, lengths, choose="even")
        name = f"cartridge of {length}"
        settings = options.model_copy(update={"num_virtual_tokens": length})
        contexts[name], seconds = distil(settings, lm, tokens, teacher)
        told[name] = {
            "steps": size.steps,
            "lr": settings.learning_rate,
            "train_questions": len(teacher.examples),
            "train_tokens": teacher.examples.num_targets,
            "train_seconds": round(seconds, 1),
        }
    contexts["the document"] = document
    measured = [(name, measure(lm, examples, document, contexts)) for name, examples in held]
    for context, kv in contexts.items():
        yield {
            "context": context,
            "context_tokens": 0 if kv is None else kv["decoder"][0].shape[2],
            "model": lm.name,
            "document": lesson.summary["document"],
            "held_out": {name: figures(found[context]) for name, found in measured},
            **told.get(context, {}),
        }


def table(results: Sequence[dict[str, Any]]) -> str:
    sets = list(results[0]["held_out"])
    columns = ["context", "tokens"]
    for name in sets:
        columns += [f"KL, {name} (95 %)", f"perplexity, {name}", f"same token, {name}"]
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for result in results:
        cells = [result["context"], f"{result['context_tokens']:,}"]
        for name in sets:
            one = result["held_out"][name]
            cells += [f"{one['kl']:.3f} ({one['kl_low']:.3f} … {one['kl_high']:.3f})"]
            cells += [f"{one['perplexity']:.2f}", f"{one['same_token']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="smoke")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "docker.md")
    parser.add_argument(
        "--questions", type=Path, default=Path(__file__).with_name("cartridge-questions.jsonl")
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = SIZES[arguments.size]
    arguments.out.mkdir(parents=True)
    options = TrainOptions(
        model=arguments.model,
        device=arguments.device,
        task="cartridge",
        method="distill",
        document=arguments.document,
        self_generate=size.generated,
        chunk_tokens=size.chunk_tokens,
        answer_tokens=size.answer_tokens,
        num_virtual_tokens=max(size.lengths),
        max_steps=size.steps,
        batch_size=BATCH_SIZE,
    )
    results = list(run(options, size, arguments.questions, arguments.out))
    lines = [json.dumps(result, ensure_ascii=False) + "\n" for result in results]
    (arguments.out / "results.jsonl").write_text("".join(lines))
    (arguments.out / "report.md").write_text(table(results))
    print(table(results), end="")


if __name__ == "__main__":
    main()
