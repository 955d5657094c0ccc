"""What the paper's GPT-2 and BART checkpoints have in common: their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefixd_store.errors import InvalidPrefix
from prefixd_store.importers.files import CheckpointFiles

__all__ = [
    "check_length",
    "check_not_embeddings",
    "is_bart",
    "is_checkpoint",
    "provenance",
    "read_config",
]

CONFIG = "config.json"
_PROVENANCE = ("preseqlen", "mid_dim", "use_deep", "prefix_dropout", "format_mode", "model_type")
_MAX_TEXT = 512


def is_checkpoint(files: CheckpointFiles) -> bool:
    return any(name.startswith("control_trans") for name in files.tensor_names())


def is_bart(files: CheckpointFiles) -> bool:
    # wte2 alone does not tell: GPT-2's infix variant has one too.
    if any(n.startswith(("control_trans2", "control_trans_enc")) for n in files.tensor_names()):
        return True
    return "decoder_layers" in (files.json(CONFIG) or {})


def read_config(files: CheckpointFiles) -> dict[str, Any]:
    """config.json; InvalidPrefix without one, and for what depends on the input."""
    config = files.json(CONFIG)
    if config is None:
        raise InvalidPrefix(
            f"{CONFIG} is missing among {files.listing()}: it tells whether the prefix was "
            "trained as an infix; upload it with the weights",
            param=CONFIG,
        )
    infix = config.get("use_infix") or config.get("format_mode") == "infix"
    if infix or ("wte2.weight" in files.tensor_names() and not is_bart(files)):
        raise InvalidPrefix(
            "the checkpoint was trained with use_infix: its keys and values depend on each "
            "request's input, so they cannot be stored",
            param="use_infix",
        )
    return config


def check_length(config: Mapping[str, Any], tokens: int, what: str = "the tensors") -> None:
    """Refuse a config whose ``preseqlen`` is not P, unless words of the task gave the length."""
    said = config.get("preseqlen")
    worded = config.get("lowdata_token") or config.get("init_shallow_word")
    if said is not None and said != tokens and not worded:
        raise InvalidPrefix(
            f"{CONFIG} says preseqlen {str(said)[:40]} but {what} have {tokens} tokens",
            param="preseqlen",
        )


def check_not_embeddings(shape: tuple[int, ...], config: Mapping[str, Any]) -> None:
    """The ablation PrefixEmbTuning trains embeddings [P, E], which are not keys and values."""
    size = config.get("n_embd", config.get("d_model"))
    if type(size) is int and shape[1] == size:
        raise InvalidPrefix(
            f"control_trans gives {list(shape)}, one embedding of {size} a token: this is the "
            "embedding-only ablation, which trains inputs of the first layer, not keys and values",
            param="control_trans",
        )


def provenance(config: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: config.get(name) for name in _PROVENANCE}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) or (isinstance(value, str) and len(value) <= _MAX_TEXT)
    }
