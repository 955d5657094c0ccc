"""Weights that are not safetensors, made into safetensors: pickles, and raw numbers.

Pickles are opened here, by their owner, and with torch's restricted unpickler, which knows tensors
and plain containers, and besides them ``torch.nn.ParameterList``, for HazyResearch's cartridges.
"""

from __future__ import annotations

import configparser
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixd._errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["convert_pickle", "convert_raw", "is_raw", "raw_task"]

# torch's name → safetensors's
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_MAX_DEPTH = 8
# Every layer of an AdapterHub model saves the prefixes once more, under this name.
_SHARED_POOL = ".prefix_tuning.pool.prefix_tunings."

# https://github.com/NVIDIA/FasterTransformer, docs/gpt_guide.md
_RAW = re.compile(r"(?:model\.)?prefix_prompt\.(.+)\.weights?\.[0-9]+\.bin")
# config.ini's weight_data_type → safetensors's dtype and its bytes
_RAW_DTYPES = {"fp32": ("F32", 4), "fp16": ("F16", 2), "bf16": ("BF16", 2)}
_CONFIG_INI = "config.ini"


def is_raw(path: Path) -> bool:
    """A FasterTransformer prefix: a ``.bin`` that is no pickle."""
    return _RAW.fullmatch(path.name) is not None


def raw_task(path: Path) -> str:
    match = _RAW.fullmatch(path.name)
    assert match is not None
    return match[1]


def convert_pickle(pickled: Path, out: Path) -> None:
    """Write what a pickle holds as safetensors; raises CheckpointError.

    Tensors in mappings, lists and ParameterLists get the keys on the way to them, joined by dots.
    """
    tensors = dict(_flat(pickled, "", _load(pickled), 0))
    names = [name for name in tensors if _SHARED_POOL not in f".{name}"]
    _write_safetensors(out, {name: tensors[name] for name in names or tensors})


def convert_raw(files: Sequence[Path], out: Path) -> None:
    """Write FasterTransformer's files of one task, one a tensor-parallel rank, as safetensors."""
    tag, size, metadata = _described(files[0].parent / _CONFIG_INI, raw_task(files[0]))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for file in files:
        start, end = end, end + file.stat().st_size
        if (end - start) % size or end == start:
            raise CheckpointError(f"{file.name} has {end - start} bytes, not a multiple of {size}")
        header[file.stem] = {
            "dtype": tag,
            "shape": [(end - start) // size],
            "data_offsets": [start, end],
        }
    with out.open("wb") as target:
        target.write(_encoded(header))
        for file in files:
            target.write(file.read_bytes())


def _described(config: Path, task: str) -> tuple[str, int, dict[str, str]]:
    """The dtype and its bytes, and what config.ini says of the task; fp32 where there is none."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(config, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{config.name} cannot be read: {reason}") from error
    dtypes = {parser[name].get("weight_data_type") for name in parser.sections()} - {None}
    said = dtypes.pop() if len(dtypes) == 1 else "fp32"
    if dtypes or said not in _RAW_DTYPES:
        found = ", ".join(sorted(str(name) for name in {said, *dtypes}))
        raise CheckpointError(
            f"{config.name} says weight_data_type {found}; known are {', '.join(_RAW_DTYPES)}"
        )
    tag, size = _RAW_DTYPES[said]
    lengths = [
        parser[name].get("prompt_length")
        for name in parser.sections()
        if parser[name].get("task_name") == task
    ]
    return tag, size, {"prompt_length": str(lengths[0])} if lengths and lengths[0] else {}


def _load(pickled: Path) -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{pickled.name} is a pickle, which is converted to safetensors before it is sent; "
            "that needs torch: pip install torch"
        ) from error
    try:
        # The one class beyond tensors that a known format needs; unpickling it runs no code of
        # the file's choosing.
        with torch.serialization.safe_globals([torch.nn.ParameterList]):
            return torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a bad file makes it raise
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{pickled.name} cannot be loaded as weights: {reason}") from error


def _flat(pickled: Path, name: str, value: Any, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    if name and isinstance(value, torch.Tensor) and dtype in _DTYPES:
        yield name, value
        return
    parts: Iterator[tuple[Any, Any]]
    if isinstance(value, Mapping):
        parts = iter(value.items())
    elif name and isinstance(value, list | tuple | torch.nn.ParameterList):
        parts = enumerate(_items(pickled, name, value))
    elif not name:
        raise CheckpointError(
            f"{pickled.name} holds a {type(value).__name__}, expected a state_dict"
        )
    else:
        kind = dtype or type(value).__name__
        raise CheckpointError(f"{pickled.name}: {name!r} is a {kind}, expected a plain tensor")
    if depth == _MAX_DEPTH:
        raise CheckpointError(f"{pickled.name}: {name[:80]!r} is nested over {_MAX_DEPTH} deep")
    for key, part in parts:
        yield from _flat(pickled, f"{name}.{key}" if name else str(key), part, depth + 1)


def _items(pickled: Path, name: str, value: Any) -> list[Any]:
    try:
        return list(value)
    except Exception as error:  # a ParameterList whose insides are not what torch makes them
        raise CheckpointError(f"{pickled.name}: {name[:80]!r} is a broken list: {error}") from error


def _write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """https://github.com/huggingface/safetensors#format: length, JSON header, raw tensors."""
    import torch

    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    with path.open("wb") as file:
        file.write(_encoded(header))
        for tensor in tensors.values():
            raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            file.write(raw.numpy().data)


def _encoded(header: Mapping[str, Any]) -> bytes:
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start aligned
    return struct.pack("<Q", len(encoded)) + encoded
