"""HazyResearch Cartridges: ``cache_last.pt``, ``cache-step{N}.pt``, ``kv_cache.torch``.

Source: ``TrainableCache`` of https://github.com/HazyResearch/cartridges (cartridges/cache.py). Each
of ``trainable_keys``, ``trainable_values`` and ``fixed_*`` (``frozen_*`` in newer ones) is a
``ParameterList`` of L tensors [1, H_kv, n, D]; the fixed ones come first and may be absent. Keys
are as attention sees them; the first prompt token is at position P. As safetensors, tensor i of a
list is named ``trainable_keys.i``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prefixd_store.arrays import PrefixArray
from prefixd_store.errors import InvalidPrefix
from prefixd_store.format import Limits, write_prefix
from prefixd_store.geometry import Geometry, SiteGeometry
from prefixd_store.importers.files import CheckpointFiles
from prefixd_store.importers.tensors import SourceTensor, check_no_more, common_dtype

NAME = "a HazyResearch cartridge (trainable_keys.0, …, fixed_keys.0 or frozen_keys.0, …)"

_NAMED = re.compile(r"(trainable|fixed|frozen)_(keys|values)\.(0|[1-9][0-9]{0,3})")
_PARTS = ("keys", "values")


def recognise(files: CheckpointFiles) -> bool:
    return any(_NAMED.fullmatch(name) for name in files.tensor_names())


def convert(files: CheckpointFiles, out: Path, geometry: Geometry, limits: Limits) -> str:
    if geometry.has_encoder:
        raise InvalidPrefix("a cartridge is for a decoder-only model; this one has an encoder")
    tensors = files.tensors()
    check_no_more(tensors, [name for name in tensors if _NAMED.fullmatch(name)], "the cartridge")
    dtype = common_dtype(tensors.values())
    segments = [
        segment
        for segment in ("fixed", "frozen", "trainable")
        if any(name.startswith(segment) for name in tensors)
    ]
    if segments not in (["trainable"], ["fixed", "trainable"], ["frozen", "trainable"]):
        raise InvalidPrefix(
            f"the cartridge has {' and '.join(segments)} tensors; expected trainable ones, after "
            "fixed or frozen ones if there are any"
        )
    sizes = [_size(tensors, segment, geometry.decoder) for segment in segments]
    tokens = sum(sizes)
    return write_prefix(
        out,
        {
            f"decoder.{one}": PrefixArray(_stack(tensors, segments, many, geometry), dtype)
            for one, many in (("key", "keys"), ("value", "values"))
        },
        query_offset=tokens,
        source_format="cartridges",
        provenance={"num_frozen_tokens": tokens - sizes[-1]},
        limits=limits,
    )


def _size(tensors: Mapping[str, SourceTensor], segment: str, site: SiteGeometry) -> int:
    """n, once all 2L tensors [1, H_kv, n, D] of a segment are there and agree."""
    names = {name for name in tensors if name.startswith(segment)}
    wanted = {f"{segment}_{part}.{i}" for part in _PARTS for i in range(site.num_layers)}
    if names != wanted:
        layers = {part: sum(n.startswith(f"{segment}_{part}.") for n in names) for part in _PARTS}
        raise InvalidPrefix(
            f"the cartridge has {layers['keys']} {segment}_keys and {layers['values']} "
            f"{segment}_values, but the model has {site.num_layers} layers, numbered from 0",
            param=sorted(names ^ wanted)[0],
        )
    first = tensors[f"{segment}_keys.0"].expect((1, site.num_kv_heads, "n", site.head_dim))
    for name in sorted(names):
        tensors[name].expect(first)
    return first[2]


def _stack(
    tensors: Mapping[str, SourceTensor], segments: list[str], part: str, geometry: Geometry
) -> npt.NDArray[Any]:
    return np.stack(
        [
            np.concatenate(
                [tensors[f"{segment}_{part}.{i}"].map().data[0] for segment in segments], axis=1
            )
            for i in range(geometry.num_layers)
        ]
    )
