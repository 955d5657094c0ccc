"""The files of one checkpoint: names that are safe to repeat, headers and JSON read once."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixd_store import strict_json
from prefixd_store.errors import InvalidPrefix, TooLarge
from prefixd_store.importers.tensors import SourceTensor
from prefixd_store.manifest import Limits
from prefixd_store.tensorfile import TensorFile, read_header

__all__ = ["CheckpointFiles", "check_file_name"]

MAX_FILES = 64
MAX_NAME_BYTES = 255
MAX_JSON_BYTES = 1 << 20

_PICKLES = (".bin", ".pt", ".pth", ".torch", ".ckpt", ".pkl", ".pickle")
# What transformers' Trainer leaves beside a checkpoint; never read, so harmless.
_TRAINER_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state(_\d+)?)\.\w+")


def check_file_name(name: str) -> str:
    """Return ``name`` if it is a plain file name, else raise :class:`InvalidPrefix`."""
    if not name or name in {".", ".."} or "/" in name or "\\" in name:
        raise InvalidPrefix(f"file name {name[:80]!r} is a path or empty", param="filename")
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        raise InvalidPrefix(
            f"file name {name[:80] + '…'!r} is over {MAX_NAME_BYTES} bytes", param="filename"
        )
    if not name.isprintable():
        raise InvalidPrefix(f"file name {name!r} has control characters", param="filename")
    return name


class CheckpointFiles:
    """A checkpoint's files by name. Raises InvalidPrefix for unsafe names and for pickles."""

    def __init__(self, paths: Mapping[str, Path], limits: Limits) -> None:
        _check_names(list(paths))
        self._paths = dict(paths)
        self._limits = limits
        self._headers: dict[str, TensorFile] = {}
        total = sum(path.stat().st_size for path in self.safetensors.values())
        if total > limits.max_bytes:
            raise TooLarge(
                f"checkpoint of {total} bytes, at most {limits.max_bytes} allowed", param="prefix"
            )

    @property
    def safetensors(self) -> dict[str, Path]:
        return {n: p for n, p in sorted(self._paths.items()) if n.lower().endswith(".safetensors")}

    def header(self, name: str) -> TensorFile:
        """The header of a safetensors file; InvalidPrefix if it is damaged."""
        if name not in self._headers:
            self._headers[name] = read_header(
                self._paths[name], max_header_bytes=self._limits.max_header_bytes, what=name
            )
        return self._headers[name]

    def json(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file, None if there is no such file; InvalidPrefix if it is bad."""
        path = self._paths.get(name)
        if path is None:
            return None
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
        if len(raw) > MAX_JSON_BYTES:
            raise InvalidPrefix(f"{name} is over {MAX_JSON_BYTES} bytes", param=name)
        return strict_json.loads(raw, what=name)

    def tensor_names(self) -> set[str]:
        return {name for file in self.safetensors for name in self.header(file).tensors}

    def tensors(self) -> dict[str, SourceTensor]:
        """Every tensor of every safetensors file; InvalidPrefix if two files hold the same one."""
        found: dict[str, SourceTensor] = {}
        for file, path in self.safetensors.items():
            for name, spec in self.header(file).tensors.items():
                if name in found:
                    raise InvalidPrefix(
                        f"tensor {name[:200]!r} is in two of the files {self.listing()}; "
                        "upload one checkpoint at a time"
                    )
                found[name] = SourceTensor(name, path, spec)
        return found

    def listing(self) -> str:
        return ", ".join(repr(name[:80]) for name in sorted(self._paths)[:10]) or "no files"


def _check_names(names: list[str]) -> None:
    if len(names) > MAX_FILES:
        raise InvalidPrefix(f"{len(names)} files, at most {MAX_FILES} allowed", param="filename")
    seen: dict[str, str] = {}
    for name in names:
        check_file_name(name)
        # Names that differ only in case or in Unicode form are one file on some disks.
        same = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if same is not name:
            raise InvalidPrefix(f"files {same!r} and {name!r} have one name", param="filename")
        if name.lower().endswith(_PICKLES) and not _TRAINER_STATE.fullmatch(name):
            raise InvalidPrefix(
                f"{name!r} is a pickle, which can run code when read, so the server does not: "
                "convert it on the client, as `prefixd push` does, and upload safetensors",
                param="filename",
            )
