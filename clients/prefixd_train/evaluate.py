"""Scores a task on a test set by asking the server that serves it.

What is scored is what clients get: the same tokeniser, prefix, batching and search.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixd import APIError, AsyncClient, Generation, Parameters, PrefixdError, Version
from prefixd._calls import active_version
from prefixd_train.errors import TrainError
from prefixd_train.prompts import Prompts
from prefixd_train.scores import Scores, markdown, score_groups
from prefixd_train.testset import Segment, groups, read_segments

__all__ = ["EvaluateOptions", "Evaluation", "evaluate"]


@dataclass(frozen=True)
class EvaluateOptions:
    task: str
    """``name`` for the active version, or ``name@version``"""
    data: Path
    template: str | None = None
    """None: the one that the version was trained with"""
    model: str | None = None
    """whose tokenizer writes messages, where the task's defaults have the server not do it"""
    parameters: Parameters | None = None
    """of the generation; None: greedy, as the task's defaults have it"""
    limit: int | None = None
    concurrency: int = 16
    lowercase: bool = False
    by_category: bool = False
    num_resamples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    version: Version
    template: str | None
    """None: all rows were messages"""
    parameters: Parameters
    segments: Sequence[Segment]
    generations: Sequence[Generation]
    scores: Scores

    def as_json(self) -> dict[str, Any]:
        """Scores, and what they are the scores of."""
        return {
            "task": self.version.task,
            "version": self.version.version,
            "sha256": self.version.sha256,
            "base_model": self.version.base_model,
            "prompt_template": self.template,
            "parameters": self.parameters,
            **self.scores.as_json(),
        }

    def write(self, folder: Path) -> None:
        """scores.json, scores.md and outputs.jsonl, one line an input."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "outputs.jsonl").open("w") as file:
            for segment, generation in zip(self.segments, self.generations, strict=True):
                print(json.dumps(_output(segment, generation), ensure_ascii=False), file=file)
        text = json.dumps(self.as_json(), indent=2, ensure_ascii=False)
        (folder / "scores.json").write_text(text + "\n")
        settings = json.dumps(self.parameters)
        title = f"# {self.version.task}@{self.version.version}, sha256 {self.version.sha256[:12]}"
        prompts = "Chats" if self.template is None else f"Template {json.dumps(self.template)}"
        about = f"{prompts}, parameters {settings}."
        (folder / "scores.md").write_text(f"{title}\n\n{about}\n\n{markdown(self.scores)}")


async def evaluate(
    client: AsyncClient,
    options: EvaluateOptions,
    *,
    on_start: Callable[[int], None] = lambda num_segments: None,
    on_output: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Generate for every input of a test set, ``concurrency`` at a time, and score the texts.

    The version is chosen once: an activate meanwhile changes nothing. Raises DataError (the line
    of the file), TrainError (the prompts would be others than in training, or ``model``
    cannot be read) and the client's errors.
    """
    prompts = await _prompts(client, options)
    version = prompts.version
    segments = read_segments(options.data, prompts.inputs, options.limit)
    templated = not all(segment.messages for segment in segments)
    template = prompts.template.text if templated else None
    parameters = options.parameters or Parameters()
    on_start(len(segments))
    generations = await _generate(client, version, segments, parameters, options, on_output)
    scores = score_groups(
        [generation.generated_text.strip() for generation in generations],
        [segment.references for segment in segments],
        groups(segments, by_category=options.by_category),
        lowercase=options.lowercase,
        num_resamples=options.num_resamples,
        seed=options.seed,
    )
    return Evaluation(version, template, parameters, segments, generations, scores)


async def _prompts(client: AsyncClient, options: EvaluateOptions) -> Prompts:
    name, at, number = options.task.partition("@")
    if at and not number.isdecimal():
        raise TrainError(f"version {number!r} in {options.task!r} is not a number")
    task = await client.task(name)
    version = await client.version(name, int(number) if at else active_version(task))
    tokenizer = None
    if options.model is not None:
        # With torch, which nothing else here needs.
        from prefixd_train.lm import UnsupportedModel, load_tokenizer

        try:
            tokenizer = load_tokenizer(options.model)
        except UnsupportedModel as error:
            raise TrainError(str(error)) from error
    chat = bool(task.defaults.get("chat_template"))
    return Prompts(version, chat, asked=options.template, tokenizer=tokenizer)


async def _generate(
    client: AsyncClient,
    version: Version,
    segments: Sequence[Segment],
    parameters: Parameters,
    options: EvaluateOptions,
    on_output: Callable[[], None],
) -> list[Generation]:
    places = asyncio.Semaphore(options.concurrency)

    async def one(segment: Segment) -> Generation:
        async with places:
            try:
                generation = await client.generate(
                    version.task, segment.prompt, version=version.version, **parameters
                )
            except APIError as error:
                # Which of a thousand inputs it was is the first thing to know.
                error.message = f"{segment.place}: {error.message}"
                raise
        on_output()
        return generation

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(segment)) for segment in segments]
    except* PrefixdError as failed:
        first = failed.exceptions[0]
    else:
        return [task.result() for task in tasks]
    raise first


def _output(segment: Segment, generation: Generation) -> dict[str, Any]:
    shown = segment._asdict() | {"output": generation.generated_text}
    return {name: value for name, value in shown.items() if value is not None}
