"""The paper's BART checkpoints: up to three prefixes, each ``wte`` through an MLP.

Source: seq2seq/prefixTuning.py of https://github.com/XiangLi1999/PrefixTuning. ``wte`` and
``control_trans`` make the decoder's, ``wte2`` and ``control_trans2`` the cross-attention's,
``wte_enc`` and ``control_trans_enc`` the encoder's. All three have a key and a value for each of
``decoder_layers`` layers; an encoder with fewer layers uses the first ones. Positions start at 0 on
both sides.
"""

from __future__ import annotations

from pathlib import Path

from prefixd_store.arrays import PrefixArray
from prefixd_store.errors import InvalidPrefix
from prefixd_store.format import Limits, write_prefix
from prefixd_store.geometry import Geometry
from prefixd_store.importers import paper
from prefixd_store.importers.files import CheckpointFiles
from prefixd_store.importers.tensors import (
    check_no_more,
    fit_rows,
    run_mlp,
    split_pairs,
)
from prefixd_store.records import Site

NAME = "the paper's BART checkpoint (config.json, control_trans, control_trans2, control_trans_enc)"

_MODULES: dict[Site, tuple[str, str]] = {
    "decoder": ("wte", "control_trans"),
    "cross": ("wte2", "control_trans2"),
    "encoder": ("wte_enc", "control_trans_enc"),
}


def recognise(files: CheckpointFiles) -> bool:
    return paper.is_checkpoint(files) and paper.is_bart(files)


def convert(files: CheckpointFiles, out: Path, geometry: Geometry, limits: Limits) -> str:
    config = paper.read_config(files)
    if geometry.encoder is None:
        raise InvalidPrefix(
            "the checkpoint was trained on BART, an encoder-decoder model; this model is "
            "decoder-only"
        )
    tensors = files.tensors()
    arrays: dict[str, PrefixArray] = {}
    used: list[str] = []
    for site, (wte, trans) in _MODULES.items():
        if f"{wte}.weight" not in tensors and f"{trans}.0.weight" not in tensors:
            continue
        rows, names = run_mlp(tensors, wte, trans, limits=limits)
        paper.check_length(config, rows.shape[0], f"{wte} and {trans}")
        arrays |= _site_arrays(site, rows, trans, geometry)
        used += names
    check_no_more(tensors, used, "the checkpoint")
    return write_prefix(
        out,
        arrays,
        query_offset=0,
        source_format="paper/bart",
        provenance=paper.provenance(config),
        limits=limits,
    )


def _site_arrays(
    site: Site, rows: PrefixArray, trans: str, geometry: Geometry
) -> dict[str, PrefixArray]:
    wanted = geometry.sites[site]
    if wanted.num_layers > geometry.num_layers or wanted[1:] != geometry.decoder[1:]:
        raise InvalidPrefix(
            f"{trans} has a key and a value for each of the decoder's layers "
            f"[L={geometry.num_layers}, H={geometry.num_kv_heads}, D={geometry.head_dim}], "
            f"which do not fit the {site} "
            f"[L={wanted.num_layers}, H={wanted.num_kv_heads}, D={wanted.head_dim}]",
            param=trans,
        )
    fit_rows(rows, geometry.num_layers, geometry.decoder, trans)
    arrays = split_pairs(rows, site, wanted.num_kv_heads, wanted.head_dim)
    return {
        name: PrefixArray(array.data[: wanted.num_layers], array.dtype)
        for name, array in arrays.items()
    }
