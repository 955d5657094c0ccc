"""Checkpoints of every format that would be accepted, and ways to damage them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.prefixd_store.checkpoints import random_arrays, save_peft, to_torch
from tests.prefixd_store.foreign import GOLDENS, cartridge, paper_gpt2

Build = Callable[[Path], object]


class Runs:
    """Unpickling it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def weights(folder: Path) -> Path:
    (file,) = [f for f in folder.iterdir() if f.suffix in {".bin", ".pt", ".safetensors"}]
    return file


def then(build: Build, *changes: Build) -> Build:
    def both(folder: Path) -> None:
        build(folder)
        for change in changes:
            change(folder)

    return both


def said(name: str = "config.json", **changes: Any) -> Build:
    def change(folder: Path) -> None:
        config = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(config))

    return change


def adapter_said(**changes: Any) -> Build:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        described = json.loads(file.read_text())
        described["config"] |= changes
        file.write_text(json.dumps(described))

    return change


def tensors(change: Callable[[dict[str, Any]], object]) -> Build:
    """Edit the weights, whichever way they are saved."""

    def edit(folder: Path) -> None:
        file = weights(folder)
        if file.suffix == ".safetensors":
            state = load_file(file)
            change(state)
            save_file(state, file)
        else:
            state = torch.load(file, weights_only=False)
            change(state)
            torch.save(state, file)

    return edit


def without(name: str) -> Build:
    return tensors(lambda state: state.pop(name))


def put(name: str, value: Any) -> Build:
    return tensors(lambda state: state.update({name: value}))


def cut(folder: Path) -> None:
    file = weights(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def removed(name: str) -> Build:
    return lambda folder: (folder / name).unlink()


def spoilt(name: str, value: float) -> Build:
    def change(state: dict[str, Any]) -> None:
        state[name] = state[name].clone()
        state[name].view(-1)[0] = value

    return tensors(change)


def made(build: Callable[..., object], **options: Any) -> Build:
    return lambda folder: build(folder, **options)


def lists(**options: Any) -> Build:
    return lambda folder: cartridge(folder / "cache_last.pt", **options)


def shared(name: str) -> Build:
    def build(folder: Path) -> None:
        for file in ("adapter_config.json", "pytorch_adapter.bin"):
            data = (GOLDENS / f"adapterhub-{name}" / file).read_bytes()
            (folder / file).write_bytes(data)

    return build


def ours(sites: tuple[str, ...] = ("decoder",), **says: str) -> Build:
    def build(folder: Path) -> None:
        state = {n: to_torch(a) for n, a in random_arrays((2, 4, 5, 8), sites=sites).items()}
        metadata = {"format": "prefixd", "format_version": "1", "num_virtual_tokens": "5"}
        save_file(state, folder / "p.safetensors", metadata | {"query_offset": "5"} | says)

    return build


def listed(part: str, change: Callable[[list[Any]], object]) -> Build:
    """Edit one ParameterList of a cartridge as a plain list of tensors."""

    def edit(state: dict[str, Any]) -> None:
        items = [parameter.detach() for parameter in state[part]]
        change(items)
        state[part] = nn.ParameterList([nn.Parameter(item, False) for item in items])

    return tensors(edit)


def ungrouped(folder: Path) -> None:
    """A head for each of four query heads where the model has two key/value heads."""
    config = {"architecture": "prefix_tuning", "flat": True, "prefix_length": 5}
    (folder / "adapter_config.json").write_text(json.dumps({"config": config, "name": "t"}))
    name = "m.prefix_tunings.t.self_prefix.control_trans"
    torch.manual_seed(0)
    save_file({name: torch.randn(5 * 6 * 4 * 8)}, folder / "adapter.safetensors")


def huge_product(folder: Path) -> None:
    """Factors of a few hundred kilobytes whose product would take gigabytes."""
    paper_gpt2(folder)
    state = {
        "wte.weight": torch.zeros(40_000, 1),
        "control_trans.0.weight": torch.zeros(1, 1),
        "control_trans.0.bias": torch.zeros(1),
        "control_trans.2.weight": torch.zeros(40_000, 1),
        "control_trans.2.bias": torch.zeros(40_000),
    }
    torch.save(state, weights(folder))


def nan_in_ours(folder: Path) -> None:
    file = folder / "p.safetensors"
    raw = bytearray(file.read_bytes())
    header = int.from_bytes(raw[:8], "little")
    raw[8 + header : 12 + header] = b"\xff" * 4
    file.write_bytes(raw)


def dtype_in_ini(folder: Path, dtype: str) -> None:
    file = folder / "config.ini"
    file.write_text(file.read_text().replace("fp32", dtype))


def both_formats(folder: Path) -> None:
    save_peft(folder, family="gpt2")
    ours()(folder)
