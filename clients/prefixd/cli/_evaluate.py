"""prefixd evaluate."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prefixd import AsyncClient, Parameters
from prefixd._transport import DEFAULT_URL
from prefixd.cli._shared import ApiKey, Url, error_line, stderr, stdout
from prefixd.cli._table import Column, print_table

if TYPE_CHECKING:
    from prefixd_train.evaluate import EvaluateOptions, Evaluation
    from prefixd_train.scores import Scores

__all__ = ["register"]


def evaluate(
    task: Annotated[str, typer.Option(metavar="TASK[@V]", help="The task, or one version.")],
    data: Annotated[Path, typer.Option(help="JSONL: rows as in training.")],
    template: Annotated[
        str | None,
        typer.Option(help="Prompt template, as '{source}\\n'; default: the training's."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Whose tokenizer writes messages, if the task does not."),
    ] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams; 1 is greedy.")] = 1,
    length_penalty: Annotated[float | None, typer.Option(help="Of the beams.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest output.")] = 128,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    by_category: Annotated[
        bool, typer.Option("--by-category", help="Score each category too.")
    ] = False,
    lowercase: Annotated[
        bool, typer.Option("--lowercase", help="BLEU and chrF ignore case.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write scores.json, scores.md and outputs.jsonl here.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    resamples: Annotated[int, typer.Option(min=1, help="Bootstrap resamples.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print scores as JSON.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Score what a running server answers for TASK on a test set.

    BLEU, chrF, ROUGE, NIST and METEOR over all references, with bootstrap intervals; apart for seen
    and unseen categories where the data tells them.
    """
    try:
        from prefixd_train.evaluate import EvaluateOptions
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("prefixd"):
            raise
        error_line(f"{error.name} is not installed: pip install 'prefixd[train]'")
        raise typer.Exit(1) from error

    parameters = Parameters(max_new_tokens=max_new_tokens, do_sample=False)
    if num_beams > 1:
        parameters |= Parameters(num_beams=num_beams, length_penalty=length_penalty)
    elif length_penalty is not None:
        raise typer.BadParameter("needs --num-beams", param_hint="--length-penalty")
    options = EvaluateOptions(
        task=task,
        data=data,
        template=template,
        model=model,
        parameters=parameters,
        limit=limit,
        concurrency=concurrency,
        lowercase=lowercase,
        by_category=by_category,
        num_resamples=resamples,
        seed=seed,
    )
    _show(asyncio.run(_run(url, api_key, options)), as_json, out)


def register(app: typer.Typer) -> None:
    app.command()(evaluate)


async def _run(url: str, api_key: str | None, options: EvaluateOptions) -> Evaluation:
    from prefixd_train.evaluate import evaluate

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    ) as bar:
        row = bar.add_task("generating", total=None)
        async with AsyncClient(url, api_key=api_key) as client:
            return await evaluate(
                client,
                options,
                on_start=lambda total: bar.update(row, total=total),
                on_output=lambda: bar.advance(row),
            )


def _show(evaluation: Evaluation, as_json: bool, out: Path | None) -> None:
    if out is not None:
        evaluation.write(out)
    if as_json:
        print(json.dumps(evaluation.as_json(), ensure_ascii=False), flush=True)
        return
    version = evaluation.version
    stdout.print(f"{version.task}@{version.version}, {len(evaluation.segments)} inputs")
    _print_scores(evaluation.scores)
    for line in evaluation.scores.missing:
        stdout.print(f"not computed: {line}")


def _print_scores(scores: Scores) -> None:
    """A metric a row: there are seldom more than three groups."""
    groups = scores.groups.values()
    print_table(
        [Column("score (95 % interval)"), *(Column(name, right=True) for name in scores.groups)],
        [
            *(
                [metric, *(str(group.scores[metric]) for group in groups)]
                for metric in scores.signatures
            ),
            ["inputs", *(str(group.num_segments) for group in groups)],
        ],
    )
