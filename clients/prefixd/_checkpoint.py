"""Which files of a checkpoint are sent, and turning pickled weights into safetensors.

The server takes safetensors only: nothing a client sends is ever unpickled there. Pickles are
opened here, by their owner, and with torch's restricted unpickler.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixd._errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["files_to_send", "is_pickle"]

CONFIGS = ("adapter_config.json",)
PICKLES = frozenset({".bin", ".pt", ".pth"})
# What trainers leave beside the weights under the same suffixes.
_TRAINER_STATE = ("optimizer", "scheduler", "scaler", "training_args", "rng_state", "trainer_state")

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


def is_pickle(path: Path) -> bool:
    return path.suffix in PICKLES


def files_to_send(path: Path, scratch: Path) -> list[Path]:
    """The files that make up the checkpoint at ``path``, a folder or one pickled file.

    ``*.safetensors`` wins over pickled weights, which are converted into the folder ``scratch``.
    Raises CheckpointError if there are no weights, naming what there is.
    """
    if path.is_dir():
        found = sorted(child for child in path.iterdir() if child.is_file())
    else:
        found = [path]
    configs = [file for file in found if file.name in CONFIGS]
    weights = [file for file in found if file.suffix == ".safetensors"]
    if not weights:
        pickles = [file for file in found if is_pickle(file) and not _is_trainer_state(file)]
        weights = [_convert(file, scratch) for file in pickles]
    if not weights:
        raise CheckpointError(_nothing_to_send(path, found))
    return configs + weights


def _is_trainer_state(file: Path) -> bool:
    return file.name.startswith(_TRAINER_STATE)


def _nothing_to_send(path: Path, found: list[Path]) -> str:
    names = [child.name for child in found[:10]]
    if len(found) > len(names):
        names.append(f"… {len(found) - len(names)} more")
    return (
        f"{path} holds no prefix: expected adapter_config.json with adapter_model.safetensors "
        f"(or .bin), found {', '.join(names) or 'no files'}"
    )


def _convert(pickled: Path, scratch: Path) -> Path:
    """Rewrite a pickled ``state_dict`` as safetensors under the same stem."""
    tensors = _load(pickled)
    converted = scratch / f"{pickled.stem}.safetensors"
    _write_safetensors(converted, tensors)
    return converted


def _load(pickled: Path) -> dict[str, torch.Tensor]:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{pickled.name} is a pickle, which is converted to safetensors before it is sent; "
            "that needs torch: pip install torch"
        ) from error
    try:
        state = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a bad file makes it raise
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{pickled.name} cannot be loaded as weights: {reason}") from error
    return _flat_state(pickled, state)


def _flat_state(pickled: Path, state: Any) -> dict[str, torch.Tensor]:
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{pickled.name} holds a {type(state).__name__}, expected a state_dict"
        )
    for name, value in state.items():
        dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
        if dtype not in _DTYPES:
            kind = dtype or type(value).__name__
            raise CheckpointError(f"{pickled.name}: {name!r} is a {kind}, expected a plain tensor")
    return dict(state)


def _write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """https://github.com/huggingface/safetensors#format: length, JSON header, raw tensors."""
    import torch

    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors.values():
            raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            file.write(raw.numpy().data)
