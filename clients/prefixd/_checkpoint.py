"""Which files of a checkpoint are sent; those that are not safetensors are converted first.

The server takes safetensors only: nothing a client sends is ever unpickled there.
"""

from __future__ import annotations

from pathlib import Path

from prefixd._errors import CheckpointError
from prefixd._pickles import convert_pickle, convert_raw, is_raw, raw_task

__all__ = ["files_to_send", "is_pickle"]

CONFIGS = ("adapter_config.json", "config.json")
PICKLES = frozenset({".bin", ".pt", ".pth", ".torch"})
# What trainers leave beside the weights under the same suffixes, and AdapterHub's prediction head.
_NOT_WEIGHTS = (
    "optimizer",
    "scheduler",
    "scaler",
    "training_args",
    "rng_state",
    "trainer_state",
    "pytorch_model_head",
    "model_head",
)


def is_pickle(path: Path) -> bool:
    """Whether the server would refuse the file, and the client converts it."""
    return path.suffix in PICKLES


def files_to_send(path: Path, scratch: Path) -> list[Path]:
    """The files that make up the checkpoint at ``path``, a folder or one file of weights.

    ``*.safetensors`` wins over other weights, which are converted into the folder ``scratch``. The
    JSON configs beside one file go with it. Raises CheckpointError if there are no weights, naming
    what there is, or if there is a choice that is the caller's.
    """
    found = sorted(child for child in _folder(path).iterdir() if child.is_file())
    configs = [file for file in found if file.name in CONFIGS]
    chosen = [file for file in found if not _is_other(file)] if path.is_dir() else [path]
    weights = [file for file in chosen if file.suffix == ".safetensors"]
    if not weights:
        weights = _converted(path, chosen, found, scratch)
    if not weights:
        raise CheckpointError(_nothing_to_send(path, found))
    return configs + weights


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.absolute().parent


def _is_other(file: Path) -> bool:
    return file.name.startswith(_NOT_WEIGHTS)


def _converted(path: Path, chosen: list[Path], found: list[Path], scratch: Path) -> list[Path]:
    raw = [file for file in chosen if is_raw(file)]
    pickles = [file for file in chosen if is_pickle(file) and not is_raw(file)]
    if raw and (not pickles or path in raw):
        return [_convert_raw(path, raw, found, scratch)]
    if len(pickles) > 1:
        names = ", ".join(file.name for file in pickles[:10])
        raise CheckpointError(f"{path} holds {len(pickles)} pickles ({names}): push one of them")
    converted = [(file, scratch / f"{file.stem}.safetensors") for file in pickles]
    for file, out in converted:
        convert_pickle(file, out)
    return [out for _, out in converted]


def _convert_raw(path: Path, raw: list[Path], found: list[Path], scratch: Path) -> Path:
    """One of a task's ranks stands for all of them."""
    tasks = sorted({raw_task(file) for file in raw})
    if len(tasks) > 1:
        raise CheckpointError(
            f"{path} holds prefixes of {len(tasks)} tasks ({', '.join(tasks[:10])}): push one of "
            "the files, and the task's others go with it"
        )
    ranks = [file for file in found if is_raw(file) and raw_task(file) == tasks[0]]
    out = scratch / "prefix_prompt.safetensors"
    convert_raw(ranks, out)
    return out


def _nothing_to_send(path: Path, found: list[Path]) -> str:
    names = [child.name for child in found[:10]]
    if len(found) > len(names):
        names.append(f"… {len(found) - len(names)} more")
    return (
        f"{path} holds no prefix: expected adapter_config.json with adapter_model.safetensors "
        f"(or .bin), or another checkpoint that docs/formats.md lists, "
        f"found {', '.join(names) or 'no files'}"
    )
