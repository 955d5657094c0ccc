"""Writes what was trained as the file that the server takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixd_store import DType, PrefixArray, write_prefix
from prefixd_train.lm import FrozenLM
from prefixd_train.parameterise import PrefixParameters
from prefixd_train.sites import InfixKV, PrefixKV

__all__ = ["InfixNotServed", "config_digest", "fold", "save_prefix"]


class InfixNotServed(ValueError):
    """An infix cannot be saved as a prefix."""


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration of JSON values, whatever the order of its keys."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def fold(prefix: PrefixParameters) -> PrefixKV:
    """The keys and values alone, without dropout; the MLP is not needed any more."""
    training = prefix.training
    prefix.eval()
    try:
        kv = prefix()
        folded = {site: (keys.detach(), values.detach()) for site, (keys, values) in kv.items()}
        return InfixKV(folded) if isinstance(kv, InfixKV) else folded
    finally:
        prefix.train(training)


def save_prefix(
    path: Path,
    lm: FrozenLM,
    prefix: PrefixParameters | PrefixKV,
    *,
    training: Mapping[str, Any],
    dtype: DType = "float32",
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """Write the folded prefix and return the file's SHA-256.

    ``training``: the configuration it was trained with (JSON values). It goes into the header with
    its digest, ``provenance`` (data digests, scores ...) beside it. Raises InfixNotServed, and
    InvalidPrefix where training left NaN or infinity or ``dtype`` overflows.
    """
    kv = fold(prefix) if isinstance(prefix, PrefixParameters) else prefix
    if isinstance(kv, InfixKV):
        raise InfixNotServed(
            "an infix stands between the input and the output, so its place depends on the input;"
            " the server puts a prefix ahead of every input. Train a prefix to serve it"
        )
    tensors = {
        f"{site}.{part}": _array(tensor).cast(dtype)
        for site, pair in kv.items()
        for part, tensor in zip(("key", "value"), pair, strict=True)
    }
    return write_prefix(
        path,
        tensors,
        query_offset=lm.query_offset({site: keys.shape[2] for site, (keys, _) in kv.items()}),
        base_fingerprint=lm.fingerprint,
        base_model=lm.name,
        provenance={
            **(provenance or {}),
            "trainer": "prefixd_train",
            "training": dict(training),
            "training_sha256": config_digest(training),
        },
    )


def _array(tensor: Tensor) -> PrefixArray:
    return PrefixArray.of(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
