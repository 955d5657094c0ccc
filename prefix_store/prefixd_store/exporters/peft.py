"""A prefix as a PEFT adapter folder: the inverse of :mod:`prefixd_store.importers.peft`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from prefixd_store.arrays import PrefixArray
from prefixd_store.errors import InvalidPrefix
from prefixd_store.format import Prefix
from prefixd_store.importers.peft import pair_map
from prefixd_store.manifest import PrefixManifest
from prefixd_store.tensorfile import write_tensors

__all__ = ["export_peft"]


def export_peft(prefix: Prefix, folder: Path, *, encoder_decoder: bool | None = None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into ``folder``.

    ``PeftModel.from_pretrained(model, folder)`` loads them and generates the same tokens. The dtype
    is kept. ``encoder_decoder`` tells the kind of model; None: as the prefix's provenance says.
    Raises :class:`InvalidPrefix` for what PEFT cannot express: sites other than the decoder's
    self-attention, a query offset that is not P, or on an encoder-decoder a prefix whose layers do
    not repeat as PEFT repeats them.
    """
    manifest = prefix.manifest
    if manifest.sites.keys() != {"decoder"}:
        found = ", ".join(sorted(manifest.sites))
        raise InvalidPrefix(f"PEFT holds a decoder's prefix alone; this one has {found}")
    if manifest.query_offset != manifest.num_virtual_tokens:
        raise InvalidPrefix(
            f"PEFT puts the prompt at position {manifest.num_virtual_tokens} (after the prefix); "
            f"this prefix has it at {manifest.query_offset}",
            param="query_offset",
        )
    if encoder_decoder is None:
        encoder_decoder = "layer_map" in manifest.provenance
    tensors = {"prompt_embeddings": _saved(prefix) if encoder_decoder else _flatten(prefix)}
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(_config(manifest, encoder_decoder), indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def _flatten(prefix: Prefix) -> PrefixArray:
    layers, heads, tokens, dim = prefix.manifest.sites["decoder"]
    key, value = prefix.arrays["decoder.key"], prefix.arrays["decoder.value"]
    rows = np.empty((tokens, 2 * layers, heads, dim), key.data.dtype)
    rows[:, 0::2] = key.data.transpose(2, 0, 1, 3)
    rows[:, 1::2] = value.data.transpose(2, 0, 1, 3)
    return PrefixArray(rows.reshape(tokens, -1), key.dtype)


def _saved(prefix: Prefix) -> PrefixArray:
    """The rows of which PEFT makes these layers on an encoder-decoder; unused pairs are zero."""
    layers, heads, tokens, dim = prefix.manifest.sites["decoder"]
    saved = _num_saved(prefix.manifest)
    taken = pair_map(saved, layers)
    parts = [prefix.arrays[f"decoder.{part}"] for part in ("key", "value")]
    rows = np.zeros((tokens, saved, 2, heads, dim), parts[0].data.dtype)
    for layer, pair in enumerate(taken):
        first = taken.index(pair)
        for i, part in enumerate(parts):
            if not np.array_equal(part.data[layer], part.data[first]):
                raise InvalidPrefix(
                    f"on an encoder-decoder PEFT gives layers {first} and {layer} the same keys "
                    "and values; this prefix's differ"
                )
            rows[:, pair, i] = part.data[layer].transpose(1, 0, 2)
    return PrefixArray(rows.reshape(tokens, -1), parts[0].dtype)


def _num_saved(manifest: PrefixManifest) -> int:
    layers = manifest.sites["decoder"][0]
    said = manifest.provenance.get("num_layers")
    # What a stranger's file says is believed only as far as it makes sense.
    return said if type(said) is int and layers <= said <= 16 * layers else layers


def _config(manifest: PrefixManifest, encoder_decoder: bool) -> dict[str, Any]:
    layers, heads, tokens, dim = manifest.sites["decoder"]
    config: dict[str, Any] = {
        "base_model_name_or_path": manifest.base_model,
        "inference_mode": True,
        "num_attention_heads": heads,
        "num_layers": _num_saved(manifest) if encoder_decoder else layers,
        "num_transformer_submodules": 2 if encoder_decoder else 1,
        "num_virtual_tokens": tokens,
        "task_type": "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM",
        "token_dim": heads * dim,
    }
    if manifest.source_format == "peft/cartridge":
        frozen = manifest.provenance.get("num_frozen_tokens")
        # Frozen tokens matter to training alone; a nonsense number must not stop PEFT from loading.
        sound = type(frozen) is int and 0 <= frozen <= tokens
        return {**config, "peft_type": "CARTRIDGE", "num_frozen_tokens": frozen if sound else 0}
    return {**config, "peft_type": "PREFIX_TUNING", "prefix_projection": False}
