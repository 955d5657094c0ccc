"""From a file of examples to a task that answers: load, train, write, upload."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console

from prefixd import Client, UploadResult
from prefixd_train.card import curl_line, model_card, plot_losses, provenance
from prefixd_train.checkpoint import Checkpoints, replace_file
from prefixd_train.data import Examples
from prefixd_train.distill import Lesson, read_lesson, teach
from prefixd_train.lm import FrozenLM, load_lm
from prefixd_train.loop import Trainer, Validation
from prefixd_train.objective import Objective, negative_log_likelihood
from prefixd_train.options import TrainOptions
from prefixd_train.parameterise import PrefixParameters
from prefixd_train.prepare import Data, check_server, make_accelerator, read_data, run_config
from prefixd_train.progress import Log, Reporter, check_tensorboard, tensorboard_log
from prefixd_train.recompute import recompute_layers
from prefixd_train.run_folder import RunFolder
from prefixd_train.save import save_prefix
from prefixd_train.sites import Site
from prefixd_train.start import prefix_lengths, start_prefix

__all__ = ["Trained", "Uploaded", "train"]


@dataclass(frozen=True)
class Uploaded:
    result: UploadResult
    curl: str
    """a line to try the task with"""


@dataclass(frozen=True)
class Trained:
    prefix: Path
    sha256: str
    steps: int
    validation: Validation
    uploaded: Uploaded | None


def train(
    options: TrainOptions,
    *,
    objective: Objective = negative_log_likelihood,
    console: Console | None = None,
) -> Trained | None:
    """One run, from options to a file and, with ``push``, a live task. Every process of a run on
    several devices calls it; all but the first get None. ``console``: where to show progress.

    Method distill brings its own objective. Raises TrainError (settings, folder, data),
    UnsupportedModel, and what an upload raises.
    """
    with closing(RunFolder(options.folder)) as folder:
        return _train(options, folder, objective, console)


def _train(
    options: TrainOptions, folder: RunFolder, objective: Objective, console: Console | None
) -> Trained | None:
    if options.tensorboard:
        check_tensorboard()
    accelerator = make_accelerator(options)
    lm = load_lm(options.model, dtype=options.dtype, device=str(accelerator.device))
    if options.push is not None:
        check_server(options.push, options.api_key, lm)
    lengths = prefix_lengths(options, lm)
    source = (
        read_lesson(options, lm, lengths)
        if options.method == "distill"
        else read_data(options, lm, lengths)
    )
    config = run_config(options, lm, lengths, source.summary)
    prefix = _start(options, lm, lengths, source)
    if accelerator.is_main_process:
        folder.open(config, resume=options.resume)
    accelerator.wait_for_everyone()
    if isinstance(source, Lesson):
        teacher, data = teach(options, lm, source, folder.teacher, accelerator)
        objective, config = teacher.divergence, config | {"data": data.summary}
    else:
        data = source
    set_seed(options.seed + accelerator.process_index)  # dropout is each process's own
    if options.gradient_checkpointing:
        recompute_layers(lm)
    reporter = Reporter()
    if accelerator.is_main_process:
        reporter = _reporter(options, folder, console)
    trainer = Trainer(
        lm,
        prefix,
        data.train,
        options,
        dev=data.dev,
        objective=objective,
        accelerator=accelerator,
        checkpoints=Checkpoints(folder.checkpoints, keep=options.keep_checkpoints),
        reporter=reporter,
    )
    for what in data.left_out:
        reporter.note(f"too long and left out: {what}")
    reporter.note(_opening(trainer, lm, prefix, data))
    _resume(trainer, folder, reporter, accelerator)
    trainer.run()
    return _finish(trainer, options, config, data, folder) if accelerator.is_main_process else None


def _start(
    options: TrainOptions, lm: FrozenLM, lengths: Mapping[Site, int], source: Lesson | Data
) -> PrefixParameters:
    """Before the run has a folder, so that what it cannot start from leaves none."""
    set_seed(options.seed)
    if isinstance(source, Lesson):
        return start_prefix(options, lm, lengths, None, document=source.document)
    return start_prefix(options, lm, lengths, source.train)


def _reporter(options: TrainOptions, folder: RunFolder, console: Console | None) -> Reporter:
    logs: list[Log] = [folder.log]
    if options.tensorboard:
        logs.append(
            tensorboard_log(folder.path, Checkpoints(folder.checkpoints, keep=1).latest_step())
        )
    return Reporter(console, log_every=options.log_every, logs=logs)


def _opening(trainer: Trainer, lm: FrozenLM, prefix: PrefixParameters, data: Data) -> str:
    trained = sum(weight.numel() for weight in prefix.parameters() if weight.requires_grad)
    frozen = sum(weight.numel() for weight in lm.module.parameters())
    return (
        f"{lm.name}: {frozen:,} frozen parameters; training {trained:,} ({trained / frozen:.2%})"
        f" on {len(data.train):,} examples in {trainer.num_steps:,} steps"
    )


def _resume(
    trainer: Trainer, folder: RunFolder, reporter: Reporter, accelerator: Accelerator
) -> None:
    checkpoint = Checkpoints(folder.checkpoints, keep=1).latest()
    if checkpoint is not None:
        trainer.load(checkpoint)
        reporter.note(f"going on after step {trainer.step}")
    if accelerator.is_main_process:
        folder.rewind(trainer.step)


def _finish(
    trainer: Trainer,
    options: TrainOptions,
    config: Mapping[str, Any],
    data: Data,
    folder: RunFolder,
) -> Trained:
    told = provenance(config, trainer.step, trainer.validation)
    card = model_card(told, trainer.prefix.lengths, data.train.shortest_prompt)
    settings = told.pop("settings")
    sha256 = replace_file(
        folder.prefix,
        lambda path: save_prefix(
            path,
            trainer.lm,
            trainer.prefix,
            dtype=options.prefix_dtype,
            training=settings,
            provenance={**told, "card": card},
        ),
    )
    replace_file(folder.card, lambda path: path.write_text(card))
    plot_losses(folder.read_metrics(), folder.plot)
    uploaded = _push(options, folder, data.train)
    return Trained(folder.prefix, sha256, trainer.step, trainer.validation, uploaded)


def _push(options: TrainOptions, folder: RunFolder, examples: Examples) -> Uploaded | None:
    if options.push is None:
        return None
    with Client(options.push, api_key=options.api_key) as client:
        result = client.push(options.task, folder.prefix)
        message = examples.shortest_message
        if message is not None:  # the server then puts inputs through the chat template too
            defaults = {**client.task(options.task).defaults, "chat_template": "model"}
            client.update(options.task, defaults=defaults)
    prompt = examples.shortest_prompt if message is None else message
    return Uploaded(result, curl_line(options.push, options.task, prompt))
