"""A frozen LM's geometry from its ``config.json`` alone, for whoever does not run the model.

Config classes of transformers name the same sizes in several ways; these are the names in use. A
server does not read them: it observes the model that it serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixd_store import strict_json
from prefixd_store.errors import InvalidPrefix, InvalidRequest
from prefixd_store.geometry import Geometry, SiteGeometry

__all__ = ["geometry_folder"]

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_WIDTH = ("hidden_size", "n_embd", "d_model")


def geometry_folder(path: Path) -> Geometry:
    """Raises :class:`InvalidRequest` if ``path`` has no config.json, or one without the sizes."""
    file = path / "config.json"
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"cannot read {file}: {error.strerror}", param="base") from error
    try:
        config = strict_json.loads(raw, what=str(file))
    except InvalidPrefix as error:
        raise InvalidRequest(error.message, param="base") from None
    # Of a model that also sees or hears, the language model.
    nested = config.get("text_config")
    config = nested if isinstance(nested, dict) else config
    if config.get("is_encoder_decoder"):
        return _encoder_decoder(config)
    return Geometry(*_decoder_only(config))


def _decoder_only(config: Mapping[str, Any]) -> SiteGeometry:
    heads = _size(config, *_HEADS)
    default = 1 if _is_multi_query(config) else heads
    return SiteGeometry(
        _size(config, *_LAYERS),
        _size(config, "num_key_value_heads", "num_kv_heads", default=default),
        _head_dim(config, heads),
    )


def _is_multi_query(config: Mapping[str, Any]) -> bool:
    # GPT-BigCode leaves out what is its default.
    return bool(config.get("multi_query", config.get("model_type") == "gpt_bigcode"))


def _encoder_decoder(config: Mapping[str, Any]) -> Geometry:
    layers = _size(config, "decoder_layers", "num_decoder_layers", *_LAYERS)
    heads = _size(config, "decoder_attention_heads", *_HEADS)
    encoder_heads = _size(config, "encoder_attention_heads", *_HEADS)
    encoder = SiteGeometry(
        _size(config, "encoder_layers", *_LAYERS[2:], *_LAYERS[:2]),
        encoder_heads,
        _head_dim(config, encoder_heads),
    )
    return Geometry(layers, heads, _head_dim(config, heads), encoder=encoder)


def _head_dim(config: Mapping[str, Any], heads: int) -> int:
    return _size(config, "head_dim", "d_kv", default=_size(config, *_WIDTH) // heads)


def _size(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise InvalidRequest(
                f"config.json: {name} is {str(value)[:40]}, expected a count", param="base"
            )
        return value
    if default is None:
        raise InvalidRequest(f"config.json has none of {', '.join(names)}", param="base")
    return default
