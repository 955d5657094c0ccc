"""Loads the frozen LM with transformers and says what the rest of the server needs of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from prefixd_server.attention import interface, seq2seq
from prefixd_server.config import ModelConfig
from prefixd_server.errors import UnsupportedModel
from prefixd_server.kv.pool import TORCH_DTYPES
from prefixd_server.models.demo import DEMO_NAME, demo_model_folder
from prefixd_server.models.packed import can_pack, pack
from prefixd_server.models.probe import observe_geometry, run_packed_step
from prefixd_server.models.quantized import quantize
from prefixd_server.models.record import record
from prefixd_server.models.seq2seq import DecoderRules, Seq2SeqModel
from prefixd_server.models.seq2seq_probe import observe_seq2seq_geometry
from prefixd_server.native.program import Program
from prefixd_store.errors import InvalidRequest
from prefixd_store.fingerprint import fingerprint_folder
from prefixd_store.geometry import Geometry

__all__ = ["LoadedModel", "load_model"]

log = logging.getLogger(__name__)

_LONGEST_REASON = 300
_PACKING_ERROR = 1e-3
"""relative; the same sums in another order stay below: 1e-6, or 2e-4 where activations are huge"""
_DEFAULT_MAX_LEN = 4096
"""where neither the config nor the tokenizer names a longest context"""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    module: nn.Module
    """transformers' own model, frozen, in eval mode, loaded with prefixd's attention"""
    tokenizer: PreTrainedTokenizerBase
    name: str
    architecture: str
    fingerprint: str | None
    """None where the model has no safetensors to fingerprint (pickled weights)"""
    geometry: Geometry
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    """of everything that is computed, and of the KV cache"""
    weights: str
    """what the linear layers' weights are kept as: the name of ``dtype``, or int8"""
    program: Program | None = None
    """the decoder-only ``module`` in one call, for float32 or int8 on the CPU"""
    seq2seq: Seq2SeqModel | None = None
    """an encoder-decoder's ``module``, with what it takes to call it; None: decoder-only"""
    decoder_rules: DecoderRules | None = None
    """how an encoder-decoder's output begins and ends"""


def load_model(config: ModelConfig) -> LoadedModel:
    """Raises UnsupportedModel, by name and with the reason, for a model that cannot be served."""
    interface.register()
    seq2seq.register()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    source = _source(config)
    device = torch.device(resolve_device(config.device))
    dtype: Any = config.dtype
    if dtype == "auto":
        dtype = _default_dtype(device)
    computed = "float32" if dtype == "int8" else dtype
    if dtype == "int8" and not can_pack(device, torch.float32):
        raise UnsupportedModel(
            f"--dtype int8 is for CPUs, with oneDNN; the model would be on {device}"
        )
    model_config = _read_config(source)
    module = _load_module(source, model_config, TORCH_DTYPES[computed])
    module = module.to(device).eval().requires_grad_(False)
    with _reading(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source)
    text_config = model_config.get_text_config()
    max_model_len = _max_model_len(
        config.max_model_len,
        _max_positions(text_config, tokenizer),
        _fixed_rope_positions(text_config),
        # T5's positions are relative: its own length is only what it was trained on.
        endless=hasattr(text_config, "relative_attention_max_distance"),
    )
    loaded_dtype = next(module.parameters()).dtype
    encoder_decoder = Seq2SeqModel(module) if model_config.is_encoder_decoder else None
    if encoder_decoder is not None:
        geometry = observe_seq2seq_geometry(encoder_decoder)
    else:
        geometry = observe_geometry(module, num_layers=text_config.num_hidden_layers)
    vocab_size = int(module.get_output_embeddings().weight.shape[0])
    packed = dtype == "int8" or (config.pack_weights and can_pack(device, loaded_dtype))
    if dtype == "int8":
        quantize(module, None if encoder_decoder else partial(run_packed_step, module))
    elif packed and encoder_decoder is not None:
        pack(module)
    elif packed:
        _pack(module)
    program = record(module, geometry) if packed and encoder_decoder is None else None
    return LoadedModel(
        module=module,
        program=program,
        tokenizer=tokenizer,
        name=config.served_name or _name(config.model),
        architecture=type(module).__name__,
        fingerprint=_fingerprint(module.config._name_or_path),
        geometry=replace(geometry, max_positions=max_model_len),
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=_eos_token_ids(module, tokenizer),
        device=device,
        dtype=loaded_dtype,
        weights=dtype,
        seq2seq=encoder_decoder,
        decoder_rules=DecoderRules.of(module) if encoder_decoder is not None else None,
    )


def _pack(module: Any) -> None:
    """Raises UnsupportedModel if the model is another one afterwards."""
    expected: list[Tensor] = []
    pack(module, lambda: expected.append(run_packed_step(module)))
    packed = run_packed_step(module)
    error = ((packed - expected[0]).norm() / expected[0].norm()).item()
    if not error <= _PACKING_ERROR:
        raise UnsupportedModel(
            f"{type(module).__name__} gives other logits with packed weights (relative error"
            f" {error:.2g}); serve it with --no-pack-weights"
        )


def resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModel("--device cuda: torch sees no CUDA device")
    return device


def _default_dtype(device: torch.device) -> str:
    if device.type == "cpu":
        return "float32"
    # float16 is what older devices compute fast; bfloat16 they only emulate.
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def _source(config: ModelConfig) -> str:
    if config.model == "demo":
        return str(demo_model_folder(Path(config.cache_dir).expanduser()))
    path = Path(config.model).expanduser()
    if path.exists():
        return str(path)
    if config.model.startswith(("/", ".", "~")):
        raise UnsupportedModel(f"--model {config.model}: there is no such folder")
    return config.model


def _name(model: str) -> str:
    if model == "demo":
        return DEMO_NAME
    return Path(model).name if Path(model).expanduser().exists() else model


@contextmanager
def _reading(source: str, what: str) -> Iterator[None]:
    """transformers says in many ways that it cannot load something; here they become one."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise UnsupportedModel(f"{source} cannot be read as a {what}: {reason}") from error


def _read_config(source: str) -> Any:
    with _reading(source, "model"):
        return AutoConfig.from_pretrained(source)


def _load_module(source: str, model_config: Any, dtype: Any) -> Any:
    loader, attention = AutoModelForCausalLM, interface.IMPLEMENTATION
    if model_config.is_encoder_decoder:
        loader, attention = AutoModelForSeq2SeqLM, seq2seq.IMPLEMENTATION
    with _reading(source, "model"):
        module = loader.from_pretrained(source, dtype=dtype, attn_implementation="eager")
    # Only now: some families look the name up among attention classes of their own. Those that
    # cannot take ours keep the one they have.
    module.set_attn_implementation(attention)
    if module.config._attn_implementation != attention:
        raise UnsupportedModel(
            f"{source} is a {model_config.model_type} model; {type(module).__name__}'s attention"
            " does not go through transformers' AttentionInterface"
        )
    return module


def _max_model_len(
    wanted: int | None, own: int, fixed_rope: int | None, *, endless: bool = False
) -> int:
    """``fixed_rope``: where :func:`_fixed_rope_positions` ends, if anywhere."""
    if wanted is not None and wanted > own and not endless:
        raise UnsupportedModel(f"--max-model-len {wanted}: the model's own context is {own}")
    longest = wanted or own
    if fixed_rope is None or longest <= fixed_rope:
        return longest
    reason = f"beyond {fixed_rope} positions, RoPE depends on the longest sequence of the batch"
    if wanted is not None:
        raise UnsupportedModel(f"--max-model-len {wanted}: {reason}")
    log.warning("serving %d of %d positions: %s", fixed_rope, own, reason)
    return fixed_rope


def _fixed_rope_positions(text_config: Any) -> int | None:
    """How many positions have frequencies of their own; None: all."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else list(parameters.values())
    limits = {
        "dynamic": lambda rope: text_config.max_position_embeddings,
        "longrope": lambda rope: rope["original_max_position_embeddings"],
    }
    found = [limits[rope["rope_type"]](rope) for rope in kinds if rope.get("rope_type") in limits]
    return min(found, default=None)


def _max_positions(text_config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    for field in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        value = getattr(text_config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    longest = int(tokenizer.model_max_length)
    # Tokenizers that do not know say 1e30.
    return longest if longest < 1_000_000 else _DEFAULT_MAX_LEN


def _eos_token_ids(module: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    eos = getattr(module.generation_config, "eos_token_id", None)
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


def _fingerprint(name_or_path: str) -> str | None:
    folder = Path(name_or_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name_or_path, local_files_only=True))
    try:
        return fingerprint_folder(folder)
    except InvalidRequest as error:
        log.warning("no base fingerprint, prefixes cannot be verified against it: %s", error)
        return None
