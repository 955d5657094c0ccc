"""NVIDIA FasterTransformer: ``model.prefix_prompt.<task>.weight[s].<rank>.bin``.

Source: the GPT guide of https://github.com/NVIDIA/FasterTransformer (docs/gpt_guide.md). Each file
is raw numbers, [L, 2, H/ranks, P, D] for one tensor-parallel rank, in the dtype that config.ini
calls ``weight_data_type``. The first prompt token is at position P. As safetensors, each file is
one tensor of any shape under the file's name less ``.bin``; the metadata may say ``prompt_length``.
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
from prefixd_store.geometry import Geometry
from prefixd_store.importers.files import CheckpointFiles
from prefixd_store.importers.tensors import SourceTensor, check_no_more, common_dtype

NAME = "a FasterTransformer prefix (model.prefix_prompt.<task>.weights.<rank>)"

_NAMED = re.compile(r"(?:model\.)?prefix_prompt\.(.+)\.weights?\.(0|[1-9][0-9]{0,3})")


def recognise(files: CheckpointFiles) -> bool:
    return any(_NAMED.fullmatch(name) for name in files.tensor_names())


def convert(files: CheckpointFiles, out: Path, geometry: Geometry, limits: Limits) -> str:
    if geometry.has_encoder:
        raise InvalidPrefix(
            "FasterTransformer's prefixes are for decoder-only models; this one has an encoder"
        )
    tensors = files.tensors()
    task, ranks = _ranks(tensors)
    check_no_more(tensors, [tensor.name for tensor in ranks], "the checkpoint")
    dtype = common_dtype(ranks)
    tokens = _num_tokens(ranks, geometry)
    _check_said(files, tokens)
    past = _join(ranks, tokens, geometry)
    return write_prefix(
        out,
        {
            "decoder.key": PrefixArray(past[:, 0], dtype),
            "decoder.value": PrefixArray(past[:, 1], dtype),
        },
        query_offset=tokens,
        source_format="fastertransformer",
        provenance={"task_name": task[:512], "tensor_parallel": len(ranks)},
        limits=limits,
    )


def _ranks(tensors: Mapping[str, SourceTensor]) -> tuple[str, list[SourceTensor]]:
    found: dict[str, dict[int, SourceTensor]] = {}
    for name, tensor in tensors.items():
        if match := _NAMED.fullmatch(name):
            found.setdefault(match[1], {})[int(match[2])] = tensor
    if len(found) > 1:
        raise InvalidPrefix(f"prefixes of the tasks {', '.join(sorted(found))[:200]}; upload one")
    ((task, ranks),) = found.items()
    if sorted(ranks) != list(range(len(ranks))):
        raise InvalidPrefix(
            f"tensor-parallel ranks {', '.join(map(str, sorted(ranks)))} of task {task[:80]!r}; "
            f"expected all of 0 to {max(ranks)}"
        )
    return task, [ranks[i] for i in range(len(ranks))]


def _num_tokens(ranks: list[SourceTensor], geometry: Geometry) -> int:
    layers, heads, dim = geometry.decoder
    sizes = {int(np.prod(tensor.shape)) for tensor in ranks}
    size = max(sizes)
    unit = layers * 2 * heads * dim
    if len(sizes) > 1 or heads % len(ranks) or not size or size * len(ranks) % unit:
        raise InvalidPrefix(
            f"{len(ranks)} ranks of {' and '.join(map(str, sorted(sizes)))} values each are not "
            f"[L, 2, H, P, D] = [{layers}, 2, {heads}, P, {dim}] split by heads: a token takes "
            f"{unit} values in all",
            param=ranks[0].name,
        )
    return size * len(ranks) // unit


def _check_said(files: CheckpointFiles, tokens: int) -> None:
    for name in files.safetensors:
        said = files.header(name).metadata.get("prompt_length", str(tokens))
        if said != str(tokens):
            raise InvalidPrefix(
                f"config.ini says prompt_length {said[:40]} but the tensors have {tokens} tokens "
                "of this model",
                param="prompt_length",
            )


def _join(ranks: list[SourceTensor], tokens: int, geometry: Geometry) -> npt.NDArray[Any]:
    """[L, 2, H, P, D], the ranks' heads side by side."""
    layers, heads, dim = geometry.decoder
    shape = (layers, 2, heads // len(ranks), tokens, dim)
    return np.concatenate([rank.map().data.reshape(shape) for rank in ranks], axis=2)
