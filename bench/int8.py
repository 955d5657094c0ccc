"""What ``--dtype int8`` costs in quality and gives in speed: ``python bench/int8.py``.

Quality compares the model in int8 with itself in float32, on 32 passages of 64 tokens of this
project's documentation and on what float32 writes (sampled at temperature 1) after the first 32
tokens of each. Perplexity is over all predicted tokens. Greedy texts are 64 tokens after those same
32 tokens. Differences of log-probabilities are over the tokens of the passages.

Speed is the engine's, output tokens over the whole time, the base model, for 1, 32 and 128 requests
at once; int8 and float32 take turns.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from harness.alternate import Case, take_turns
from harness.machine import describe
from harness.options import Options, parser
from harness.processes import Peer
from harness.report import TOKENS_PER_S, Column, Report
from torch import Tensor

from prefixd_server.config import ModelConfig
from prefixd_server.models.loader import LoadedModel, load_model

PASSAGES, PASSAGE_TOKENS, PROMPT_TOKENS, NEW_TOKENS = 32, 64, 32, 64
ROWS = (1, 32, 128)
SIZES = {"smoke": (1, 8), "full": (3, 32)}
"""rounds and new tokens of the speed cases"""
ROOT = Path(__file__).parents[1]

QUALITY = (
    Column("perplexity_docs", "perplexity, documentation"),
    Column("perplexity_own", "perplexity, float32's own text"),
    Column("top1", "same likeliest token"),
    Column("mean_difference", "mean difference of log p"),
    Column("largest_difference", "largest"),
    Column("same_texts", f"greedy texts equal over {NEW_TOKENS} tokens"),
    Column("same_tokens", "greedy tokens before the first difference, mean"),
)


def load(options: Options, dtype: Literal["float32", "int8"]) -> LoadedModel:
    return load_model(
        ModelConfig(model=str(options.model), device="cpu", dtype=dtype, threads=options.threads)
    )


def passages(model: LoadedModel) -> Tensor:
    """[PASSAGES, PASSAGE_TOKENS], evenly over the documentation."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    ids = torch.tensor(model.tokenizer(text)["input_ids"])
    starts = torch.linspace(0, len(ids) - PASSAGE_TOKENS, PASSAGES).long()
    return torch.stack([ids[start : start + PASSAGE_TOKENS] for start in starts])


@torch.inference_mode()
def generate(model: LoadedModel, prompts: Tensor, *, sample: bool) -> Tensor:
    """[N, prompt + NEW_TOKENS], no end of text."""
    module: Any = model.module
    module.set_attn_implementation("sdpa")
    torch.manual_seed(0)
    output: Tensor = module.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        do_sample=sample,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
    )
    return output


@torch.inference_mode()
def scores(model: LoadedModel, texts: Tensor) -> tuple[Tensor, Tensor]:
    """log p of each token but the first, and the likeliest token in its place, [N, T - 1] both."""
    module: Any = model.module
    module.set_attn_implementation("sdpa")
    log_p, likeliest = [], []
    for rows in texts.split(8):
        logits = module(input_ids=rows, use_cache=False).logits[:, :-1]
        log_p.append(logits.log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0])
        likeliest.append(logits.argmax(-1))
    return torch.cat(log_p), torch.cat(likeliest)


def quality(options: Options) -> list[Case]:
    reference = load(options, "float32")
    docs = passages(reference)
    prompts = docs[:, :PROMPT_TOKENS]
    own, greedy = (generate(reference, prompts, sample=sample) for sample in (True, False))
    expected, likeliest = scores(reference, docs)
    cases = []
    for dtype in ("float32", "int8"):
        model = reference if dtype == "float32" else load(options, dtype)
        on_docs, best = scores(model, docs)
        on_own = scores(model, own)[0][:, PROMPT_TOKENS - 1 :]
        mine = greedy if model is reference else generate(model, prompts, sample=False)
        same = (mine == greedy)[:, PROMPT_TOKENS:]
        difference = (on_docs - expected).abs()
        figures = {
            "perplexity_docs": on_docs.mean().neg().exp(),
            "perplexity_own": on_own.mean().neg().exp(),
            "top1": (best == likeliest).float().mean(),
            "mean_difference": difference.mean(),
            "largest_difference": difference.max(),
            "same_texts": same.all(1).float().mean(),
            "same_tokens": same.long().cumprod(1).sum(1).float().mean(),
        }
        runs = [{name: float(figure) for name, figure in figures.items()}]
        cases.append(Case(dtype, dict, runs=runs))
    return cases


def speed(options: Options, rounds: int, new_tokens: int) -> list[Case]:
    with ExitStack() as stack:
        store = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = {}
        for dtype in ("float32", "int8"):
            engines[dtype] = Peer.engine(options.flags(store, f"--dtype={dtype}"))
            stack.callback(engines[dtype].close)
        for engine in engines.values():
            engine.wait_until_ready()
            for rows in ROWS:
                engine.run(rows, 2, 0)
        cases = [
            Case(f"{dtype}, {rows} rows", partial(engine.run, rows, new_tokens, 0))
            for rows in ROWS
            for dtype, engine in engines.items()
        ]
        take_turns(cases, rounds)
    for case in cases:
        for run in case.runs:
            run.pop("first", None)
    return cases


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--only", choices=["quality", "speed"])
    arguments = options_parser.parse_args()
    options, (rounds, new_tokens) = Options.of(arguments), SIZES[arguments.size]
    machine = describe(options.threads)
    if arguments.only != "speed":
        what = f"Quality; greedy texts of {NEW_TOKENS} tokens, {PASSAGES} passages."
        settings = options.settings()
        report = Report("int8", arguments.size, what, machine, settings, quality(options), QUALITY)
        report.publish(save=not arguments.no_save)
    if arguments.only != "quality":
        cases = speed(options, rounds, new_tokens)
        what = f"Speed; the base model, {new_tokens} greedy tokens a request, {rounds} rounds."
        report = Report(
            "int8", arguments.size, what, machine, options.settings(), cases, (TOKENS_PER_S,)
        )
        by_name = {case.name: case for case in cases}
        for rows in ROWS:
            mine, other = (by_name[f"{dtype}, {rows} rows"] for dtype in ("int8", "float32"))
            report.compare(f"{rows} rows: int8 ÷ float32", mine, other)
        report.publish(save=not arguments.no_save)


if __name__ == "__main__":
    main()
