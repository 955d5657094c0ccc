"""AdapterHub ``adapters``: adapter_config.json and adapter.safetensors (or pytorch_adapter.bin).

Source: https://github.com/adapter-hub/adapters (methods/prefix_tuning.py). Tensors are named
``….prefix_tunings.<name>.<location>.`` and ``wte.weight`` with an MLP ``control_trans.{0,2}``, or,
once ejected, ``control_trans`` alone, flat [P*2L*H*D]. The location is ``encoder_prefix``,
``cross_prefix`` or ``self_prefix``. Every layer that uses the pool saves it once more under its own
name (``….pool.prefix_tunings.…``): those are the same tensors. Positions start at 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixd_store.arrays import PrefixArray
from prefixd_store.errors import InvalidPrefix
from prefixd_store.format import Limits, write_prefix
from prefixd_store.geometry import Geometry, SiteGeometry
from prefixd_store.importers.files import CheckpointFiles
from prefixd_store.importers.tensors import SourceTensor, fit_rows, run_mlp, split_pairs
from prefixd_store.records import Site

NAME = "an AdapterHub prefix (adapter_config.json, adapter.safetensors)"

CONFIG = "adapter_config.json"
_NAMED = re.compile(r"(?:.+\.)?prefix_tunings\.([^.]+)\.([^.]+)\.(.+)")
_GATE = "prefix_gates."
_HEAD = "model_head.safetensors"
_SITES: dict[str, Site] = {
    "encoder_prefix": "encoder",
    "cross_prefix": "cross",
    "self_prefix": "decoder",
    "self": "decoder",
}
_PROVENANCE = ("name", "version", "model_class")
_MAX_TEXT = 512


def recognise(files: CheckpointFiles) -> bool:
    return any("prefix_tunings." in name or _GATE in name for name in files.tensor_names())


def convert(files: CheckpointFiles, out: Path, geometry: Geometry, limits: Limits) -> str:
    described = files.json(CONFIG) or {}
    config = _prefix_config(described)
    sites = _by_site(files)
    _check_sites(sites, config, geometry)
    arrays: dict[str, PrefixArray] = {}
    for site, tensors in sites.items():
        rows = _rows(tensors, config, site, geometry.sites[site], limits)
        _check_length(rows.shape[0], site, config)
        arrays |= _fitted(rows, site, geometry.sites[site])
    name = described.get("model_name")
    return write_prefix(
        out,
        arrays,
        query_offset=0,
        base_model=name if isinstance(name, str) and name else None,
        source_format="adapterhub/prefix_tuning",
        provenance={
            key: value
            for key in _PROVENANCE
            if isinstance(value := described.get(key), str) and len(value) <= _MAX_TEXT
        },
        limits=limits,
    )


def _prefix_config(described: Mapping[str, Any]) -> Mapping[str, Any]:
    config = described.get("config")
    if not isinstance(config, dict):
        raise InvalidPrefix(f"{CONFIG} with the adapter's config is missing", param=CONFIG)
    architecture = config.get("architecture")
    if architecture != "prefix_tuning":
        raise InvalidPrefix(
            f"architecture is {str(architecture)[:80]}, expected prefix_tuning alone",
            param="architecture",
        )
    if config.get("use_gating"):
        raise InvalidPrefix(_GATED, param="use_gating")
    if config.get("leave_out"):
        raise InvalidPrefix(
            f"leave_out is {str(config['leave_out'])[:80]}: a stored prefix has keys and values "
            "for every layer",
            param="leave_out",
        )
    return config


_GATED = (
    "the prefix has gates (use_gating), which scale its keys and values by each request's input, "
    "so they cannot be stored"
)


def _by_site(files: CheckpointFiles) -> dict[Site, dict[str, SourceTensor]]:
    """Site → the tensors of its module by their names in it."""
    found: dict[Site, dict[str, SourceTensor]] = {}
    adapters: set[str] = set()
    # Shortest first: the pool's own name is shorter than those of the layers that share it.
    for name, tensor in sorted(files.tensors().items(), key=lambda item: (len(item[0]), item[0])):
        if tensor.path == files.safetensors.get(_HEAD):
            continue
        if _GATE in name:
            raise InvalidPrefix(_GATED, param=name[:200])
        match = _NAMED.fullmatch(name)
        if match is None or match[2] not in _SITES:
            raise InvalidPrefix(
                f"the adapter also has {name[:200]!r}, which is not a prefix's: the model here is "
                "frozen and shared",
                param=name[:200],
            )
        adapters.add(match[1])
        first = found.setdefault(_SITES[match[2]], {}).setdefault(match[3], tensor)
        if first.shape != tensor.shape:
            raise InvalidPrefix(
                f"{first.name[:200]} has shape {list(first.shape)} but {name[:200]} has shape "
                f"{list(tensor.shape)}",
                param=name[:200],
            )
    if len(adapters) != 1:
        raise InvalidPrefix(f"adapters {', '.join(sorted(adapters))[:200]}; upload one at a time")
    return found


def _check_sites(sites: Mapping[Site, Any], config: Mapping[str, Any], geometry: Geometry) -> None:
    if not sites.keys() <= geometry.sites.keys():
        raise InvalidPrefix(
            f"the adapter has prefixes for {', '.join(sorted(sites))}; this model is decoder-only "
            "and takes decoder alone"
        )
    if not geometry.has_encoder:
        return
    # Both default to true; a decoder-only model just has nowhere to put them.
    for site in ("encoder", "cross"):
        if config.get(f"{site}_prefix", True) and site not in sites:
            raise InvalidPrefix(
                f"{CONFIG} says {site}_prefix but there is no {site}_prefix tensor: it was trained "
                "on a decoder-only model, and this model has an encoder",
                param=f"{site}_prefix",
            )


def _rows(
    tensors: Mapping[str, SourceTensor],
    config: Mapping[str, Any],
    site: Site,
    wanted: SiteGeometry,
    limits: Limits,
) -> PrefixArray:
    """[P, L*2*H*D], for H heads that may still be the query heads."""
    if "control_trans" in tensors:
        rows, used = _flat(tensors["control_trans"], config), ["control_trans"]
    else:
        activation = str(config.get("non_linearity", "tanh")).lower()
        if activation not in ("tanh", "relu"):
            raise InvalidPrefix(
                f"non_linearity {activation[:40]} is not known; known are tanh and relu: eject the "
                "prefix (model.eject_prefix_tuning) and save it again",
                param="non_linearity",
            )
        relu = activation == "relu"
        rows, used = run_mlp(tensors, "wte", "control_trans", limits=limits, relu=relu)
    extra = sorted(set(tensors) - set(used))
    if extra:
        raise InvalidPrefix(f"unknown tensor {tensors[extra[0]].name[:200]!r}", param=extra[0])
    return rows


def _flat(tensor: SourceTensor, config: Mapping[str, Any]) -> PrefixArray:
    (size,) = tensor.expect(("P*2L*H*D",))
    tokens = config.get("prefix_length")
    if type(tokens) is not int or tokens < 1 or size % tokens:
        raise InvalidPrefix(
            f"{tensor.name[:200]} has {size} values, which {CONFIG}'s prefix_length "
            f"{str(tokens)[:40]} does not divide",
            param="prefix_length",
        )
    flat = tensor.map()
    return PrefixArray(flat.data.reshape(tokens, -1), flat.dtype)


def _fitted(rows: PrefixArray, site: Site, wanted: SiteGeometry) -> dict[str, PrefixArray]:
    """The site's tensors, one head for each group where there is one for every query head."""
    layers, heads, dim = wanted
    width = rows.shape[1]
    groups, rest = divmod(width, layers * 2 * heads * dim)
    if rest or groups < 1:
        fit_rows(rows, layers, wanted, f"{site} control_trans")
    arrays = split_pairs(rows, site, groups * heads, dim)
    if groups == 1:
        return arrays
    return {name: _one_a_group(name, array, heads) for name, array in arrays.items()}


def _one_a_group(name: str, array: PrefixArray, heads: int) -> PrefixArray:
    layers, query_heads, tokens, dim = array.shape
    grouped = array.data.reshape(layers, heads, -1, tokens, dim)
    if not (grouped == grouped[:, :, :1]).all():
        raise InvalidPrefix(
            f"{name} is [L={layers}, H={query_heads}, P={tokens}, D={dim}], one for each query "
            f"head, and heads of one group differ; the model takes [L={layers}, H_kv={heads}, P, "
            f"D={dim}], one for each key/value head",
            param=name,
        )
    return PrefixArray(grouped[:, :, 0], array.dtype)


def _check_length(tokens: int, site: Site, config: Mapping[str, Any]) -> None:
    said = config.get("prefix_length", tokens)
    if said != tokens:
        raise InvalidPrefix(
            f"{CONFIG} says prefix_length {str(said)[:40]} but the {site} tensors have {tokens} "
            "tokens",
            param="prefix_length",
        )
