"""The paper's GPT-2 checkpoints: config.json and the weights of its ``PrefixTuning`` module.

Source: gpt2/train_control.py of https://github.com/XiangLi1999/PrefixTuning. Either
``wte.weight`` [P, E] and an MLP ``control_trans`` of two linear layers (three: the deep variant),
or ``control_trans`` itself, trained directly: flat [P*2L*E], or [2L, 1, H, P, D] where it was
initialised with the activations of real words. The first prompt token is at position P.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixd_store.arrays import PrefixArray
from prefixd_store.errors import InvalidPrefix
from prefixd_store.format import Limits, write_prefix
from prefixd_store.geometry import Geometry, SiteGeometry
from prefixd_store.importers import paper
from prefixd_store.importers.files import CheckpointFiles
from prefixd_store.importers.tensors import (
    SourceTensor,
    check_no_more,
    fit_rows,
    run_mlp,
    split_pairs,
)

NAME = "the paper's GPT-2 checkpoint (config.json, control_trans and wte)"

TRANS = "control_trans"


def recognise(files: CheckpointFiles) -> bool:
    return paper.is_checkpoint(files) and not paper.is_bart(files)


def convert(files: CheckpointFiles, out: Path, geometry: Geometry, limits: Limits) -> str:
    config = paper.read_config(files)
    if geometry.has_encoder:
        raise InvalidPrefix(
            "the checkpoint was trained on GPT-2, a decoder-only model; this model has an encoder"
        )
    tensors = files.tensors()
    if TRANS in tensors:
        arrays, used = _direct(tensors[TRANS], config, geometry.decoder), [TRANS]
    else:
        rows, used = run_mlp(tensors, "wte", TRANS, limits=limits)
        paper.check_not_embeddings(rows.shape, config)
        fit_rows(rows, geometry.num_layers, geometry.decoder, TRANS)
        arrays = split_pairs(rows, "decoder", geometry.num_kv_heads, geometry.head_dim)
    check_no_more(tensors, used, "the checkpoint")
    tokens = arrays["decoder.key"].shape[2]
    paper.check_length(config, tokens)
    return write_prefix(
        out,
        arrays,
        query_offset=tokens,
        source_format="paper/gpt2",
        provenance=paper.provenance(config),
        limits=limits,
    )


def _direct(
    tensor: SourceTensor, config: Mapping[str, Any], site: SiteGeometry
) -> dict[str, PrefixArray]:
    layers, heads, dim = site
    if len(tensor.shape) == 5:
        tensor.expect((2 * layers, 1, heads, "P", dim))
        past = tensor.map()
        return {
            f"decoder.{part}": PrefixArray(past.data[i::2, 0], past.dtype)
            for i, part in enumerate(("key", "value"))
        }
    (size,) = tensor.expect(("P*2L*E",))
    width = layers * 2 * heads * dim
    said = config.get("preseqlen")
    tokens = said if type(said) is int and said > 0 else max(1, size // width)
    if size != tokens * width:
        raise InvalidPrefix(
            f"{TRANS} has {size} values, but {tokens} virtual tokens of this model take "
            f"P*L*2*H_kv*D = {tokens}*{layers}*2*{heads}*{dim} = {tokens * width}",
            param=TRANS,
        )
    flat = tensor.map()
    rows = PrefixArray(flat.data.reshape(tokens, width), flat.dtype)
    return split_pairs(rows, "decoder", heads, dim)
