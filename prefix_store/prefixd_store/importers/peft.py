"""PEFT's ``PREFIX_TUNING`` and ``CARTRIDGE``: adapter_config.json and one flat tensor.

``prompt_embeddings`` [P, L*2*H_kv*D] viewed as [P, 2L, H_kv, D] holds the keys of layer i in row 2i
and its values in row 2i+1 (``PeftModel.get_prompt``). The first prompt token is at position P. With
``prefix_projection`` the saved tensor is already projected, so there is no MLP to look for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prefixd_store.arrays import STORAGE, PrefixArray
from prefixd_store.errors import InvalidPrefix
from prefixd_store.format import Limits, write_prefix
from prefixd_store.geometry import Geometry
from prefixd_store.importers.files import CheckpointFiles
from prefixd_store.tensorfile import TAGS, TensorSpec

NAME = "a PEFT PREFIX_TUNING or CARTRIDGE adapter (adapter_config.json, adapter_model.safetensors)"

CONFIG = "adapter_config.json"
TENSOR = "prompt_embeddings"

_SOURCE_FORMATS = {"PREFIX_TUNING": "peft/prefix_tuning", "CARTRIDGE": "peft/cartridge"}
_EMBEDDING_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT")
_PROVENANCE = (
    "peft_type",
    "peft_version",
    "task_type",
    "num_frozen_tokens",
    "prefix_projection",
    "revision",
)

_MAX_TEXT = 512

# https://github.com/huggingface/peft/issues/2881
_OLD_PEFT = (
    ". PEFT before 0.18 saved a wrong width for models whose head_dim is not hidden_size / "
    "num_attention_heads (peft issue 2881): train the prefix again with PEFT 0.18 or newer"
)


def recognise(files: CheckpointFiles) -> bool:
    return "peft_type" in (files.json(CONFIG) or {})


def convert(files: CheckpointFiles, out: Path, geometry: Geometry, limits: Limits) -> str:
    config = files.json(CONFIG) or {}
    source_format = _source_format(config)
    _check_decoder_only(config)
    name, spec = _find_tensor(files)
    tokens = _check_shape(spec, config, geometry)
    rows = _map(files.safetensors[name], spec).reshape(
        tokens, 2 * geometry.num_layers, geometry.num_kv_heads, geometry.head_dim
    )
    dtype = TAGS[spec.tag]
    return write_prefix(
        out,
        {
            # [P, L, H_kv, D] to [L, H_kv, P, D]: views of the file, copied as they are written
            "decoder.key": PrefixArray(rows[:, 0::2].transpose(1, 2, 0, 3), dtype),
            "decoder.value": PrefixArray(rows[:, 1::2].transpose(1, 2, 0, 3), dtype),
        },
        query_offset=tokens,
        base_model=_string(config, "base_model_name_or_path"),
        source_format=source_format,
        provenance=_provenance(config),
        limits=limits,
    )


def _source_format(config: Mapping[str, Any]) -> str:
    peft_type = config["peft_type"]
    if isinstance(peft_type, str) and peft_type in _SOURCE_FORMATS:
        return _SOURCE_FORMATS[peft_type]
    if peft_type in _EMBEDDING_PROMPTS:
        reason = "it trains input embeddings, not keys and values"
    else:
        reason = "it changes the model's weights or layers, and the model here is frozen and shared"
    raise InvalidPrefix(
        f"peft_type {str(peft_type)[:80]} cannot be served as a prefix: {reason}. "
        f"Served are {' and '.join(_SOURCE_FORMATS)}",
        param="peft_type",
    )


def _check_decoder_only(config: Mapping[str, Any]) -> None:
    task, submodules = config.get("task_type"), config.get("num_transformer_submodules")
    if task == "SEQ_2_SEQ_LM" or submodules == 2:
        raise InvalidPrefix("encoder-decoder prefixes are not served yet", param="task_type")
    if task not in (None, "CAUSAL_LM"):
        raise InvalidPrefix(
            f"task_type {str(task)[:80]} does not generate text; expected CAUSAL_LM",
            param="task_type",
        )
    if submodules not in (None, 1):
        raise InvalidPrefix(
            f"num_transformer_submodules is {str(submodules)[:80]}, expected 1",
            param="num_transformer_submodules",
        )


def _find_tensor(files: CheckpointFiles) -> tuple[str, TensorSpec]:
    tensors = [
        (file, tensor, spec)
        for file in files.safetensors
        for tensor, spec in files.header(file).tensors.items()
    ]
    found = [(file, spec) for file, tensor, spec in tensors if tensor == TENSOR]
    if len(found) != 1:
        raise InvalidPrefix(
            f"{len(found)} tensors named {TENSOR} among {files.listing()}, expected one",
            param=TENSOR,
        )
    extra = sorted(tensor for _, tensor, _ in tensors if tensor != TENSOR)
    if extra:
        raise InvalidPrefix(
            f"the adapter also changes {extra[0][:200]!r} (of {len(extra)} more tensors); "
            "the model here is frozen and shared"
        )
    return found[0]


def _check_shape(spec: TensorSpec, config: Mapping[str, Any], geometry: Geometry) -> int:
    """P, once tensor, config and model agree on every size."""
    if spec.tag not in TAGS:
        raise InvalidPrefix(
            f"{TENSOR} is {spec.tag[:40]}; accepted are {', '.join(TAGS)}", param=TENSOR
        )
    if len(spec.shape) != 2 or 0 in spec.shape:
        raise InvalidPrefix(
            f"{TENSOR} has shape {list(spec.shape)}, expected [P, L*2*H_kv*D]", param=TENSOR
        )
    tokens, width = spec.shape
    said = config.get("num_virtual_tokens")
    if type(said) is not int or said != tokens:
        raise InvalidPrefix(
            f"{CONFIG} says num_virtual_tokens {str(said)[:80]} "
            f"but {TENSOR} is [{tokens}, {width}]",
            param="num_virtual_tokens",
        )
    _check_model(width, config, geometry)
    return tokens


def _check_model(width: int, config: Mapping[str, Any], geometry: Geometry) -> None:
    layers, heads, dim = geometry.num_layers, geometry.num_kv_heads, geometry.head_dim
    expected = layers * 2 * heads * dim
    # A width may agree by chance, two layers of four heads for four of two: the config tells.
    said = {
        "num_layers": (config.get("num_layers"), layers),
        "num_attention_heads": (config.get("num_attention_heads"), heads),
        "token_dim": (config.get("token_dim"), heads * dim),
    }
    wrong = {name: pair for name, pair in said.items() if pair[0] not in (None, pair[1])}
    if width == expected and not wrong:
        return
    config_says = ", ".join(
        f"{name} {str(got)[:40]} (model: {want})" for name, (got, want) in wrong.items()
    )
    raise InvalidPrefix(
        f"{TENSOR} is [P, {width}] but the model takes [P, L*2*H_kv*D] = "
        f"[P, {layers}*2*{heads}*{dim}] = [P, {expected}]"
        + (f"; {CONFIG} says {config_says}" if wrong else "")
        + (_OLD_PEFT if set(wrong) == {"token_dim"} and "peft_version" not in config else ""),
        param=TENSOR,
    )


def _map(path: Path, spec: TensorSpec) -> np.memmap[Any, Any]:
    return np.memmap(path, STORAGE[TAGS[spec.tag]], "r", spec.begin, spec.shape)


def _provenance(config: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: config.get(name) for name in _PROVENANCE}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int) or (isinstance(value, str) and len(value) <= _MAX_TEXT)
    }


def _string(config: Mapping[str, Any], name: str) -> str | None:
    value = config.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidPrefix(f"{CONFIG}: {name} must be a string or null", param=name)
    return value or None
