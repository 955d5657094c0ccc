"""PEFT's ``PREFIX_TUNING`` and ``CARTRIDGE``: adapter_config.json and one flat tensor.

``prompt_embeddings`` [P, L*2*H_kv*D] viewed as [P, 2L, H_kv, D] holds the keys of layer i in row 2i
and its values in row 2i+1 (``PeftModel.get_prompt``). The first prompt token is at position P. With
``prefix_projection`` the saved tensor is already projected, so there is no MLP to look for.

On an encoder-decoder the prefix goes to the decoder's self-attention alone, and PEFT joins the rows
to themselves and splits the result by four: layer i of the decoder gets the saved pair 2i mod L;
the odd pairs are never used when L is even. The stored prefix is what the layers got.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixd_store.errors import InvalidPrefix
from prefixd_store.format import Limits, write_prefix
from prefixd_store.geometry import Geometry
from prefixd_store.importers.files import CheckpointFiles
from prefixd_store.importers.tensors import SourceTensor, split_pairs

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
    _check_family(config, geometry)
    tensor = _find_tensor(files)
    layers = _source_layers(tensor, config, geometry)
    tokens = _check_shape(tensor, config, layers, geometry)
    layer_map = pair_map(layers, geometry.num_layers) if geometry.has_encoder else None
    return write_prefix(
        out,
        # views of the file, copied as they are written
        split_pairs(tensor.map(), "decoder", geometry.num_kv_heads, geometry.head_dim, layer_map),
        query_offset=tokens,
        base_model=_string(config, "base_model_name_or_path"),
        source_format=source_format,
        provenance=_provenance(config)
        | ({"layer_map": layer_map, "num_layers": layers} if layer_map else {}),
        limits=limits,
    )


def pair_map(num_saved: int, num_layers: int) -> list[int]:
    """The saved pair that each layer of an encoder-decoder's decoder gets in PEFT."""
    return [2 * i % num_saved for i in range(num_layers)]


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


def _check_family(config: Mapping[str, Any], geometry: Geometry) -> None:
    task, submodules = config.get("task_type"), config.get("num_transformer_submodules")
    if task not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise InvalidPrefix(
            f"task_type {str(task)[:80]} does not generate text; expected CAUSAL_LM or "
            "SEQ_2_SEQ_LM",
            param="task_type",
        )
    if submodules not in (None, 1, 2):
        raise InvalidPrefix(
            f"num_transformer_submodules is {str(submodules)[:80]}, expected 1 or 2",
            param="num_transformer_submodules",
        )
    # Without either field PEFT takes the adapter for a decoder-only model's.
    two_sided = submodules == 2 if submodules is not None else task == "SEQ_2_SEQ_LM"
    if two_sided != geometry.has_encoder:
        kinds = {True: "an encoder-decoder", False: "a decoder-only"}
        raise InvalidPrefix(
            f"the adapter was trained on {kinds[two_sided]} model (task_type {task}, "
            f"num_transformer_submodules {submodules}), but this is "
            f"{kinds[geometry.has_encoder]} model",
            param="task_type",
        )


def _source_layers(tensor: SourceTensor, config: Mapping[str, Any], geometry: Geometry) -> int:
    """The layers that the tensor has pairs for: the model's, or on an encoder-decoder the encoder's
    (which PEFT counts), at least as many as the decoder has."""
    said = config.get("num_layers")
    if not geometry.has_encoder or type(said) is not int or said == geometry.num_layers:
        return geometry.num_layers
    if said < geometry.num_layers:
        raise InvalidPrefix(
            f"{TENSOR} is {list(tensor.shape)} for num_layers {said}, but the decoder has "
            f"{geometry.num_layers} layers and the last ones would get no prefix",
            param="num_layers",
        )
    return said


def _find_tensor(files: CheckpointFiles) -> SourceTensor:
    tensors = [
        SourceTensor(tensor, path, spec)
        for file, path in files.safetensors.items()
        for tensor, spec in files.header(file).tensors.items()
    ]
    found = [tensor for tensor in tensors if tensor.name == TENSOR]
    if len(found) != 1:
        raise InvalidPrefix(
            f"{len(found)} tensors named {TENSOR} among {files.listing()}, expected one",
            param=TENSOR,
        )
    extra = sorted(tensor.name for tensor in tensors if tensor.name != TENSOR)
    if extra:
        raise InvalidPrefix(
            f"the adapter also changes {extra[0][:200]!r} (of {len(extra)} more tensors); "
            "the model here is frozen and shared"
        )
    return found[0]


def _check_shape(
    tensor: SourceTensor, config: Mapping[str, Any], layers: int, geometry: Geometry
) -> int:
    """P, once tensor, config and model agree on every size."""
    tensor.dtype  # noqa: B018 - raises for one that a prefix may not have
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise InvalidPrefix(
            f"{TENSOR} has shape {list(tensor.shape)}, expected [P, L*2*H_kv*D]", param=TENSOR
        )
    tokens, width = tensor.shape
    said = config.get("num_virtual_tokens")
    if type(said) is not int or said != tokens:
        raise InvalidPrefix(
            f"{CONFIG} says num_virtual_tokens {str(said)[:80]} "
            f"but {TENSOR} is [{tokens}, {width}]",
            param="num_virtual_tokens",
        )
    _check_model(width, config, layers, geometry)
    return tokens


def _check_model(width: int, config: Mapping[str, Any], layers: int, geometry: Geometry) -> None:
    heads, dim = geometry.num_kv_heads, geometry.head_dim
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
