"""All settings of a training run, each with its default and one line of help.

``prefixd train`` makes its options from these fields, so a setting is written once.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from prefixd_train.template import PromptTemplate

__all__ = ["PANELS", "TrainOptions"]

DEFAULT_LR = {"direct": 1e-2, "mlp": 5e-4, "mlp-deep": 5e-4}
"""by parameterisation; an MLP moves every virtual token with each weight, so it takes less"""

_MAX_LENGTH = 65536
_MAX_TEXT = 400

# What may differ when a run is resumed: it does not change what is trained.
_FREE = {"out", "resume", "push", "api_key", "tensorboard", "device", "threads"}
_FREE |= {"log_every", "save_every", "keep_checkpoints"}
# Named by their content elsewhere: a run may be resumed, and is told of, wherever the files lie.
_FREE |= {"model", "data", "dev", "init_from", "init_file", "document", "questions"}


class TrainOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field("demo", description="folder, hub id, or `demo` (SmolLM2-135M-Instruct)")
    data: Path | None = Field(None, description="training examples, JSONL")
    task: str = Field(description="name of the task", pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")
    out: Path | None = Field(None, description="folder of the run; default: runs/TASK")
    resume: bool = Field(False, description="go on from the folder's last checkpoint")
    push: str | None = Field(None, description="URL of a server to upload to when trained")
    api_key: str | None = Field(None, description="sent to that server as a bearer token")

    method: Literal["examples", "distill"] = Field(
        "examples", description="train on examples, or distil a document into the prefix"
    )
    document: Path | None = Field(None, description="text to distil, UTF-8")
    questions: Path | None = Field(None, description="questions about it, JSONL")
    self_generate: int | None = Field(
        None, ge=1, description="let the model write so many questions instead"
    )
    chunk_tokens: int = Field(
        512, ge=1, description="tokens of the document that it reads to write one"
    )
    answer_tokens: int = Field(64, ge=1, description="most tokens of an answer that it writes")
    top_k: int = Field(
        20, ge=1, description="likeliest tokens of which the model's distribution is matched"
    )

    dev: Path | None = Field(None, description="examples to validate on, JSONL")
    dev_fraction: float = Field(
        0.0, ge=0, lt=1, description="validate on so much of the training data instead"
    )
    prompt_template: str | None = Field(
        None,
        description="prompt of a row, its fields in braces; default: {source} and a line end,"
        " {source} alone for an encoder-decoder, a question and an answer to distil",
    )
    targets: Literal["all", "first"] = Field(
        "all", description="of a row with several: each an example, or only the first"
    )
    max_length: int | None = Field(
        None, ge=2, description="most tokens of an example; default: the model's own limit"
    )
    too_long: Literal["error", "skip"] = Field("error", description="what to do about longer rows")

    num_virtual_tokens: int = Field(20, ge=1, le=_MAX_LENGTH, description="length of the prefix, P")
    sites: str = Field(
        "all",
        description="where it goes: all, or some of decoder,encoder,cross; cross=5 has a length"
        " of its own",
    )
    parameterisation: Literal["direct", "mlp", "mlp-deep"] = Field(
        "direct", description="train keys and values themselves, or an MLP that gives them"
    )
    hidden: int = Field(512, ge=1, description="MLP: width of its input")
    middle: int = Field(512, ge=1, description="MLP: width of its middle")
    prefix_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the prefix")
    frozen_first: int | None = Field(
        None,
        ge=0,
        description="virtual tokens that keep their first values; default: 0, to distil 1",
    )
    init: Literal["text", "words", "prefix", "random"] = Field(
        "text",
        description="start from the model's activations: of a text's first P tokens, or of words"
        " repeated to P; from a prefix file; or at random",
    )
    init_text: str | None = Field(
        None, description="that text or those words; default: training examples, the document"
    )
    init_file: Path | None = Field(None, description="a file of them instead, UTF-8")
    init_choose: Literal["first", "even"] = Field(
        "first", description="of a text: its first P tokens, or P evenly chosen from all of it"
    )
    init_from: Path | None = Field(None, description="that prefix file")

    lr: float | None = Field(
        None, gt=0, description="learning rate; default: 1e-2 direct, 5e-4 for an MLP"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="of the learning rate, after the warm-up"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps that warm up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    max_grad_norm: float = Field(1.0, gt=0, description="clip the gradient to this norm")
    epochs: int = Field(5, ge=1, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="optimiser steps, instead of epochs")
    batch_size: int = Field(8, ge=1, description="examples of a forward pass, over all devices")
    grad_accum: int = Field(1, ge=1, description="forward passes of an optimiser step")
    eval_every: int | None = Field(
        None, ge=1, description="steps between validations; default: an epoch"
    )
    patience: int | None = Field(
        None, ge=1, description="stop after so many validations without a better one"
    )
    eval_metric: Literal["loss", "token-accuracy"] = Field(
        "loss", description="what tells the better prefix on the validation data"
    )

    prefix_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the file that is written"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the frozen model; the prefix is trained in float32"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="autocast")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA if present")
    threads: int | None = Field(None, ge=1, description="CPU threads for torch; default: torch's")
    gradient_checkpointing: bool = Field(
        False, description="less memory, a third more time: recompute in the backward pass"
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of order, initial values and dropout")

    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics")
    tensorboard: bool = Field(False, description="write TensorBoard's event files too")

    @field_validator("prompt_template")
    @classmethod
    def _template(cls, text: str | None) -> str | None:
        if text is not None:
            PromptTemplate(text)
        return text

    @field_validator("sites")
    @classmethod
    def _sites(cls, text: str) -> str:
        _lengths(text, default=1)
        return text

    @model_validator(mode="after")
    def _together(self) -> Self:
        self._check_method()
        if self.dev is not None and self.dev_fraction:
            raise ValueError("dev and dev_fraction exclude each other")
        if self.patience is not None and self.dev is None and not self.dev_fraction:
            raise ValueError("patience needs dev or dev_fraction: it counts validations")
        if self.eval_metric != "loss" and self.dev is None and not self.dev_fraction:
            raise ValueError(f"eval_metric {self.eval_metric} needs dev or dev_fraction")
        if (self.init == "prefix") != (self.init_from is not None):
            raise ValueError("init prefix and init_from go together")
        self._check_init_text()
        if self.dtype == "float16" and self.mixed_precision != "fp16":
            raise ValueError("dtype float16 needs mixed_precision fp16: small gradients vanish")
        return self

    def _check_init_text(self) -> None:
        given = [name for name in ("init_text", "init_file") if getattr(self, name)]
        if len(given) == 2:
            raise ValueError("init_text and init_file exclude each other")
        if given and self.init not in ("text", "words"):
            raise ValueError(f"{given[0]} is of no use to init {self.init}")
        if self.init == "words" and not given:
            raise ValueError("init words needs init_text or init_file")
        if self.init_choose == "even":
            if self.init != "text":
                raise ValueError(f"init_choose even is of no use to init {self.init}")
            if not given and self.document is None:
                raise ValueError("init_choose even needs init_text, init_file or a document")

    def _check_method(self) -> None:
        if self.method == "examples":
            for name in ("document", "questions", "self_generate"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs method distill")
            if self.data is None:
                raise ValueError("data is missing: examples to train on")
            return
        for name in ("data", "dev"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is of no use to method distill; dev_fraction may be")
        if self.document is None:
            raise ValueError("method distill needs a document")
        if (self.questions is None) == (self.self_generate is None):
            raise ValueError("method distill needs one of questions and self_generate")

    @property
    def starts_from_data(self) -> bool:
        """From the training examples or the document, as nothing else is named."""
        return self.init == "text" and not self.init_text and self.init_file is None

    @property
    def asked_lengths(self) -> dict[str, int]:
        """P of each name in ``sites``, which may be ``all`` and may be none of the LM's."""
        return _lengths(self.sites, default=self.num_virtual_tokens)

    @property
    def num_frozen(self) -> int:
        """A cartridge's first token is frozen: attention rests there, and training it alone is
        unstable (arXiv 2506.06266, section 3.2)."""
        if self.frozen_first is not None:
            return self.frozen_first
        return 1 if self.method == "distill" else 0

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / self.task

    @property
    def learning_rate(self) -> float:
        return self.lr or DEFAULT_LR[self.parameterisation]

    def training(self) -> dict[str, Any]:
        """What determines the result, as JSON values: the same for a run and its resumption. A long
        text is cut, and named by its digest."""
        values = self.model_dump(mode="json", exclude=_FREE)
        return {name: _cut(value) for name, value in values.items()}


def _lengths(sites: str, default: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in sites.split(","):
        name, has_length, length = part.partition("=")
        if name in found:
            raise ValueError(f"{name} is named twice")
        number = int(length) if re.fullmatch(r"[0-9]{1,5}", length) else 0
        if has_length and not 1 <= number <= _MAX_LENGTH:
            raise ValueError(f"the length of {name} is {length!r}; it must be 1 to {_MAX_LENGTH}")
        found[name] = number if has_length else default
    return found


def _cut(value: Any) -> Any:
    if not isinstance(value, str) or len(value) <= _MAX_TEXT:
        return value
    digest = hashlib.sha256(value.encode()).hexdigest()
    return f"{value[:_MAX_TEXT]}… ({len(value)} characters, sha256 {digest})"


PANELS = {
    "The run": ("model", "data", "task", "out", "resume", "push", "api_key"),
    "Data": ("dev", "dev_fraction", "prompt_template", "targets", "max_length", "too_long"),
    "Distillation": (
        "method",
        "document",
        "questions",
        "self_generate",
        "chunk_tokens",
        "answer_tokens",
        "top_k",
    ),
    "Prefix": (
        "num_virtual_tokens",
        "sites",
        "parameterisation",
        "hidden",
        "middle",
        "prefix_dropout",
        "frozen_first",
        "init",
        "init_text",
        "init_file",
        "init_choose",
        "init_from",
    ),
    "Optimisation": (
        "lr",
        "schedule",
        "warmup",
        "weight_decay",
        "max_grad_norm",
        "epochs",
        "max_steps",
        "batch_size",
        "grad_accum",
        "eval_every",
        "patience",
        "eval_metric",
        "seed",
    ),
    "Hardware": ("dtype", "mixed_precision", "device", "threads", "gradient_checkpointing"),
    "Records": ("prefix_dtype", "save_every", "keep_checkpoints", "log_every", "tensorboard"),
}
"""the sections of --help, each with its fields"""
