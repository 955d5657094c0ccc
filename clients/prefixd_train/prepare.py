"""What a run needs before its first step: devices, a server that will take it, data that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from prefixd import Client
from prefixd_train.data import (
    Encoder,
    Examples,
    check_several,
    file_sha256,
    read_examples,
    split,
)
from prefixd_train.errors import TrainError
from prefixd_train.lm import FrozenLM
from prefixd_train.options import TrainOptions
from prefixd_train.sites import Site
from prefixd_train.template import PromptTemplate
from prefixd_train.text_file import check_is_file

__all__ = ["Data", "check_server", "make_accelerator", "prompt_template", "read_data", "run_config"]


@dataclass(frozen=True)
class Data:
    train: Examples
    dev: Examples | None
    summary: Mapping[str, Any]
    """files, digests and counts, as JSON values"""
    left_out: Sequence[str] = ()
    """what was too long, in words"""


def make_accelerator(options: TrainOptions) -> Accelerator:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise TrainError("device cuda: torch finds no CUDA device")
    cpu = options.device == "cpu" or not has_cuda
    if cpu and options.mixed_precision == "fp16":
        raise TrainError("mixed_precision fp16 needs a GPU; bf16 runs on a CPU too")
    shared = AcceleratorState._shared_state
    if shared and (shared["_mixed_precision"], shared["_cpu"]) != (options.mixed_precision, cpu):
        # accelerate keeps the first run's for the life of the process, and has no public way to
        # let go of it. Processes of a launcher stay connected.
        AcceleratorState._reset_state(reset_partial_state=shared["num_processes"] == 1)
    return Accelerator(cpu=cpu, mixed_precision=options.mixed_precision)


def check_server(url: str, api_key: str | None, lm: FrozenLM) -> None:
    """Before hours of training, not after them."""
    with Client(url, api_key=api_key) as client:
        model = client.info().model
    if None not in (model.fingerprint, lm.fingerprint) and model.fingerprint != lm.fingerprint:
        raise TrainError(
            f"{url} serves another model: its {model.name} has the fingerprint"
            f" {model.fingerprint}, {lm.name} has {lm.fingerprint}"
        )


def read_data(options: TrainOptions, lm: FrozenLM, lengths: Mapping[Site, int]) -> Data:
    assert options.data is not None
    max_source, max_total = _room(options, lm, lengths)
    encoder = Encoder(
        lm.tokenizer,
        PromptTemplate(prompt_template(options, lm)),
        is_encoder_decoder=lm.is_encoder_decoder,
        max_source=max_source,
        max_total=max_total,
    )
    files = {"train": options.data} | ({"dev": options.dev} if options.dev else {})
    parts: dict[str, Examples] = {}
    for name, path in files.items():
        parts[name] = read_examples(
            path, encoder, targets=options.targets, too_long=options.too_long
        )
    digests = {name: file_sha256(path) for name, path in files.items()}
    left_out = [
        f"{part.num_skipped:,} of {files[name]}" for name, part in parts.items() if part.num_skipped
    ]
    if options.dev_fraction:
        parts["train"], parts["dev"] = split(
            options.data, parts["train"], options.dev_fraction, seed=options.seed
        )
    else:
        check_several(options.data, parts["train"], "training")
    summary: dict[str, Any] = {"dev": None}
    for name, examples in parts.items():
        summary[name] = {
            "file": files.get(name, options.data).name,
            "sha256": digests.get(name, digests["train"]),
            "examples": len(examples),
            "target_tokens": examples.num_targets,
            "rows_skipped": examples.num_skipped,
            "prompts": sorted(examples.prompts),
        }
    return Data(parts["train"], parts.get("dev"), summary, left_out)


def _room(
    options: TrainOptions, lm: FrozenLM, lengths: Mapping[Site, int]
) -> tuple[int | None, int | None]:
    """Most tokens of a source, and of what the decoder reads."""
    if lm.max_positions is None:
        return options.max_length, options.max_length
    first = lm.query_offset(lengths) if "decoder" in lengths else 0
    if lm.max_positions - first < 2:
        raise TrainError(
            f"{first} virtual tokens leave no room: {lm.name} has {lm.max_positions} positions"
        )
    asked = options.max_length or lm.max_positions
    source = min(asked, lm.max_positions) if lm.is_encoder_decoder else None
    return source, min(asked, lm.max_positions - first)


def run_config(
    options: TrainOptions, lm: FrozenLM, lengths: Mapping[Site, int], data: Mapping[str, Any]
) -> dict[str, Any]:
    """What determines the result, as JSON values. ``data`` names files by their content."""
    config: dict[str, Any] = {
        "settings": options.training() | {"prompt_template": prompt_template(options, lm)},
        "base_model": lm.name,
        "base_fingerprint": lm.fingerprint,
        "sites": list(lengths),
        "learning_rate": options.learning_rate,
        "data": data,
    }
    for name in ("init_from", "init_file"):
        path = getattr(options, name)
        if path is not None:
            check_is_file(path)
            config[f"{name}_sha256"] = file_sha256(path)
    return config


def prompt_template(options: TrainOptions, lm: FrozenLM) -> str:
    default = "{source}" if lm.is_encoder_decoder else "{source}\n"
    if options.method == "distill":
        default = "Question: {source}\nAnswer:"
    return options.prompt_template or default
