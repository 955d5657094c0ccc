"""Checkpoints of other projects, saved as their own code saves them, and what they mean.

Each builder writes a folder and returns the keys and values [L, H, P, D] by tensor name that the
original code feeds the model.
"""

from __future__ import annotations

import configparser
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prefixd._checkpoint import files_to_send
from prefixd_store import Geometry, Prefix, SiteGeometry, import_checkpoint, parse_prefix

Expected = dict[str, torch.Tensor]

GPT2 = Geometry(2, 4, 8)
LLAMA = Geometry(3, 2, 8)
BART = Geometry(3, 4, 8, encoder=SiteGeometry(2, 4, 8))
WIDTH = 32
GOLDENS = Path(__file__).parent / "goldens"


def sent(path: Path, geometry: Geometry, out: Path) -> Prefix:
    """What the server stores of what the client sends: the two halves of a push."""
    with tempfile.TemporaryDirectory() as scratch:
        files = {file.name: file for file in files_to_send(path, Path(scratch))}
        import_checkpoint(files, out, geometry=geometry)
    return parse_prefix(out.read_bytes())


def past_of(rows: torch.Tensor, num_heads: int, site: str = "decoder") -> Expected:
    """``view(bsz, P, 2L, H, D).permute([2, 0, 3, 1, 4]).split(2)``, as the paper's code has it."""
    tokens, width = rows.shape
    dim = WIDTH // num_heads
    past = rows.view(1, tokens, width // WIDTH, num_heads, dim).permute([2, 0, 3, 1, 4]).split(2)
    return {
        f"{site}.{part}": torch.stack([layer[i, 0] for layer in past])
        for i, part in enumerate(("key", "value"))
    }


def mlp(num_layers: int, *, mid: int = 6, deep: bool = False) -> nn.Sequential:
    hidden = [nn.Linear(mid, mid), nn.Tanh()] if deep else []
    return nn.Sequential(
        nn.Linear(WIDTH, mid), nn.Tanh(), *hidden, nn.Linear(mid, num_layers * 2 * WIDTH)
    )


def cartridge(
    file: Path,
    *,
    frozen: int = 1,
    trainable: int = 4,
    name: str = "fixed",
    dtype: torch.dtype = torch.float32,
    geometry: Geometry = LLAMA,
) -> Expected:
    """``TrainableCache.save``: a dict of four ParameterLists, the fixed ones maybe empty."""
    torch.manual_seed(0)
    layers, heads, dim = geometry.decoder
    tokens = frozen + trainable
    full = {
        part: [torch.randn(1, heads, tokens, dim).to(dtype) for _ in range(layers)]
        for part in ("keys", "values")
    }
    state = {}
    for part, tensors in full.items():
        state[f"trainable_{part}"] = nn.ParameterList(
            [nn.Parameter(t[:, :, frozen:].contiguous()) for t in tensors]
        )
        state[f"{name}_{part}"] = nn.ParameterList(
            [nn.Parameter(t[:, :, :frozen].contiguous()) for t in tensors] if frozen else []
        )
    torch.save(state, file)
    return {
        "decoder.key": torch.cat(full["keys"]),
        "decoder.value": torch.cat(full["values"]),
    }


def save_paper(folder: Path, module: nn.Module, config: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(module.state_dict(), folder / "pytorch_model.bin")


class PaperGPT2(nn.Module):
    """The parameters of ``PrefixTuning`` in the paper's gpt2/train_control.py."""

    def __init__(self, kind: str, tokens: int) -> None:
        super().__init__()
        layers, heads, dim = GPT2.decoder
        if kind == "flat":
            self.control_trans = nn.Parameter(torch.randn(tokens * layers * 2 * WIDTH))
        elif kind == "words":
            self.control_trans = nn.Parameter(torch.randn(2 * layers, 1, heads, tokens, dim))
        else:
            self.wte = nn.Embedding(tokens, WIDTH)
            self.control_trans = mlp(layers, deep=kind == "deep")

    def past(self, tokens: int) -> Expected:
        trans = self.control_trans
        if isinstance(trans, nn.Sequential):
            return past_of(trans(self.wte(torch.arange(tokens))), GPT2.num_kv_heads)
        if trans.dim() == 1:
            return past_of(trans.view(tokens, -1), GPT2.num_kv_heads)
        pairs = trans.split(2)
        return {
            f"decoder.{part}": torch.stack([layer[i, 0] for layer in pairs])
            for i, part in enumerate(("key", "value"))
        }


def paper_gpt2(folder: Path, kind: str = "mlp", *, tokens: int = 5, **config: Any) -> Expected:
    torch.manual_seed(0)
    module = PaperGPT2(kind, tokens)
    said = {"model_type": "gpt2", "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "preseqlen": tokens}
    save_paper(folder, module, said | {"use_infix": False, "optim_prefix": True} | config)
    with torch.no_grad():
        return module.past(tokens)


class PaperBART(nn.Module):
    """The parameters of ``PrefixTuning`` in the paper's seq2seq/prefixTuning.py."""

    def __init__(self, lengths: Mapping[str, int], deep: bool) -> None:
        super().__init__()
        layers = BART.num_layers
        for site, tokens in lengths.items():
            suffix = {"decoder": "", "cross": "2", "encoder": "_enc"}[site]
            setattr(self, f"wte{suffix}", nn.Embedding(tokens, WIDTH))
            setattr(self, f"control_trans{suffix}", mlp(layers, deep=deep))


def paper_bart(
    folder: Path,
    *,
    tokens: int = 5,
    deep: bool = False,
    sites: tuple[str, ...] = ("decoder", "cross", "encoder"),
    lengths: Mapping[str, int] | None = None,
    **config: Any,
) -> Expected:
    torch.manual_seed(0)
    own = dict.fromkeys(sites, tokens) if lengths is None else lengths
    module = PaperBART(own, deep)
    said = {"model_type": "bart", "d_model": WIDTH, "decoder_layers": 3, "encoder_layers": 2}
    if lengths is None:
        said["preseqlen"] = tokens
    save_paper(folder, module, said | {"use_infix": False} | config)
    expected: Expected = {}
    with torch.no_grad():
        for site, tokens in own.items():
            suffix = {"decoder": "", "cross": "2", "encoder": "_enc"}[site]
            wte, trans = getattr(module, f"wte{suffix}"), getattr(module, f"control_trans{suffix}")
            past = past_of(trans(wte(torch.arange(tokens))), BART.num_kv_heads, site)
            # ``past_key_values[idx]`` for each layer of its side
            expected |= {name: t[: BART.sites[site].num_layers] for name, t in past.items()}  # type: ignore[index]
    return expected


def faster_transformer(
    folder: Path, *, tokens: int = 5, ranks: int = 2, half: bool = False, task: str = "sum"
) -> Expected:
    """[L, 2, H, P, D], each rank its heads: ``tofile`` as NVIDIA's converters do it."""
    folder.mkdir(exist_ok=True)
    layers, heads, dim = GPT2.decoder
    kind = np.float16 if half else np.float32
    past = np.random.default_rng(0).standard_normal((layers, 2, heads, tokens, dim)).astype(kind)
    for rank, part in enumerate(np.split(past, ranks, axis=2)):
        part.tofile(folder / f"model.prefix_prompt.{task}.weights.{rank}.bin")
    config = configparser.ConfigParser()
    config["gpt"] = {"num_layer": str(layers), "weight_data_type": "fp16" if half else "fp32"}
    config["task_0"] = {"task_name": task, "prompt_length": str(tokens), "prompt_type": "2"}
    with (folder / "config.ini").open("w") as file:
        config.write(file)
    return {
        "decoder.key": torch.from_numpy(past[:, 0].copy()),
        "decoder.value": torch.from_numpy(past[:, 1].copy()),
    }
