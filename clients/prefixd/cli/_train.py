"""train: makes a prefix from examples, where torch and its kin are installed."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from prefixd.cli._shared import error_line, stderr, stdout
from prefixd_train.options import PANELS, TrainOptions

__all__ = ["needs_train_extra", "register"]

_EXTRA = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface_hub")


def register(app: typer.Typer) -> None:
    app.command("train", help="Train a prefix on a JSONL file, the model frozen, and upload it.")(
        _command()
    )


def needs_train_extra(error: ModuleNotFoundError) -> bool:
    """Whether an install of ``prefixd[train]`` would mend this import."""
    return (error.name or "").partition(".")[0] in _EXTRA


def _command() -> Any:
    """A command with one option for each setting."""

    def command(**given: Any) -> None:
        try:
            options = TrainOptions(**{k: v for k, v in given.items() if v is not None})
        except ValidationError as error:
            error_line("; ".join(_complaint(item) for item in error.errors()))
            raise typer.Exit(2) from error
        _train(options)

    fields = TrainOptions.model_fields
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [_option(panel, name, fields[name]) for panel, names in PANELS.items() for name in names]
    )
    return command


def _train(options: TrainOptions) -> None:
    try:
        from prefixd_train.lm import UnsupportedModel
        from prefixd_train.train import train
    except ModuleNotFoundError as error:
        if not needs_train_extra(error):
            raise
        error_line(f"training needs {error.name}: pip install 'prefixd[train]'")
        raise typer.Exit(1) from error
    try:
        trained = train(options, console=stderr)
    except UnsupportedModel as error:
        error_line(str(error))
        raise typer.Exit(1) from error
    if trained is None:
        return
    _say(f"{trained.prefix} (sha256 {trained.sha256[:12]}, {trained.steps} steps)")
    if trained.uploaded is not None:
        result = trained.uploaded.result
        state = "active" if result.active else "not active"
        _say(f"{result.task}@{result.version} ({state}); try it:\n\n{trained.uploaded.curl}")


def _say(text: str) -> None:
    stdout.print(text, markup=False, soft_wrap=True)


def _option(panel: str, name: str, field: FieldInfo) -> inspect.Parameter:
    flag = name.replace("_", "-")
    default = None if field.is_required() else field.get_default()
    option = typer.Option(
        f"--{flag}/--no-{flag}" if isinstance(default, bool) else f"--{flag}",
        envvar="PREFIXD_API_KEY" if name == "api_key" else None,
        help=field.description,
        show_default=False if default is None else str(default),
        rich_help_panel=panel,
    )
    kind: Any = field.annotation
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        # None means "not given": the model's own default holds.
        default=inspect.Parameter.empty if field.is_required() else None,
        annotation=Annotated[kind if field.is_required() else kind | None, option],
    )


def _complaint(item: Any) -> str:
    message = item["msg"].removeprefix("Value error, ")
    if not item["loc"]:
        return str(message)
    return f"--{str(item['loc'][-1]).replace('_', '-')}: {message} (got {item['input']!r})"
