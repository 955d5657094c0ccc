"""Loads the LM that stays frozen."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from prefixd_store import InvalidRequest, fingerprint_folder, leading_length
from prefixd_train import attention
from prefixd_train.demo import DEMO_NAME, demo_model_folder
from prefixd_train.frozen_linear import speed_up_frozen
from prefixd_train.probe import UnsupportedModel, assign_roles, observe_shapes
from prefixd_train.sites import Site, SiteShape

__all__ = ["DEFAULT_CACHE", "FrozenLM", "UnsupportedModel", "load_lm", "load_tokenizer"]

log = logging.getLogger(__name__)

DEFAULT_CACHE = Path("~/.cache/prefixd")

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, eq=False)
class FrozenLM:
    module: Any
    """transformers' own model in eval mode, nothing requires grad, with our attention function"""
    tokenizer: Any
    name: str
    folder: Path
    fingerprint: str | None
    """None where the model has no safetensors to fingerprint (pickled weights)"""
    is_encoder_decoder: bool
    shapes: Mapping[Site, SiteShape]
    """the sites that this LM has"""
    max_positions: int | None
    """prefix and own tokens of a stream may be this long together; None: no limit"""
    has_relative_positions: bool
    """an encoder-decoder like T5, whose positions are relative and not embedded"""

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.module.device)

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.module.get_input_embeddings().weight.dtype)

    def checksum(self) -> str:
        """SHA-256 over all parameters and buffers, to show that training left them alone."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def query_offset(self, lengths: Mapping[Site, int]) -> int:
        """What a file says of a prefix with P tokens at these sites: that each stream begins behind
        its own, or 0 where one goes to an encoder with absolute positions, which begin at 0."""
        if "encoder" in lengths and not self.has_relative_positions:
            return 0
        return leading_length(lengths)


def load_lm(
    model: str, *, dtype: str = "float32", device: str = "cpu", cache_dir: Path = DEFAULT_CACHE
) -> FrozenLM:
    """``model``: a folder, a hub name or "demo". Raises UnsupportedModel (a ValueError) by name and
    with the reason."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    attention.register()
    source = _source(model, cache_dir)
    try:
        config = AutoConfig.from_pretrained(source)
        loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        module = loader.from_pretrained(source, dtype=_DTYPES[dtype], attn_implementation="eager")
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedModel(f"{source} cannot be read as a model: {reason}") from error
    # Only now: some families look the name up among attention classes of their own. Those that
    # cannot take ours keep the one they have.
    module.set_attn_implementation(attention.IMPLEMENTATION)
    if module.config._attn_implementation != attention.IMPLEMENTATION:
        raise UnsupportedModel(
            f"{source} is a {config.model_type} model; {type(module).__name__}'s attention does"
            " not go through transformers' AttentionInterface"
        )
    module = module.to(device).eval().requires_grad_(False)
    speed_up_frozen(module)
    relative = assign_roles(module) if config.is_encoder_decoder else False
    folder = _folder(module.config._name_or_path)
    return FrozenLM(
        module=module,
        tokenizer=tokenizer,
        name=_name(model),
        folder=folder,
        fingerprint=_fingerprint(folder),
        is_encoder_decoder=bool(config.is_encoder_decoder),
        shapes=observe_shapes(module),
        max_positions=None if relative else _max_positions(config.get_text_config()),
        has_relative_positions=relative,
    )


def load_tokenizer(model: str, *, cache_dir: Path = DEFAULT_CACHE) -> Any:
    """``model`` as in :func:`load_lm`. Raises UnsupportedModel."""
    source = _source(model, cache_dir)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedModel(f"{source} has no tokenizer that can be read: {reason}") from error


def _source(model: str, cache_dir: Path) -> str:
    if model == "demo":
        return str(demo_model_folder(cache_dir))
    path = Path(model).expanduser()
    if path.exists():
        return str(path)
    if model.startswith(("/", ".", "~")):
        raise UnsupportedModel(f"{model}: there is no such folder")
    return model


def _name(model: str) -> str:
    if model == "demo":
        return DEMO_NAME
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _max_positions(text_config: Any) -> int | None:
    for field in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        value = getattr(text_config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _folder(name_or_path: str) -> Path:
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name_or_path, local_files_only=True))


def _fingerprint(folder: Path) -> str | None:
    try:
        return fingerprint_folder(folder)
    except InvalidRequest as error:
        log.warning("no base fingerprint, prefixes cannot be verified against it: %s", error)
        return None
