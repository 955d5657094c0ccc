"""Writes what was trained as the file that the server takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixd_train.lm import FrozenLM
from prefixd_train.parameterise import PrefixParameters
from prefixd_train.sites import Placement

__all__ = ["save_prefix"]


def save_prefix(
    path: Path,
    lm: FrozenLM,
    prefix: PrefixParameters,
    *,
    dtype: str = "float32",
    placement: Placement = "prefix",
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """Fold the parameters into keys and values, write them, return the file's SHA-256.

    ``provenance`` (JSON values: the training config, its digest, data digests, scores) goes into
    the header. Raises ValueError for an infix, whose place depends on the input.
    """
    raise NotImplementedError
