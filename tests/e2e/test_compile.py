"""Text to prefix: the compiled prefix stands for its text, token for token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prefixd_server.config import ModelConfig
from prefixd_server.models.loader import load_model
from prefixd_store import PrefixArray, write_prefix
from prefixd_store.format import validate_file
from tests.support.engine import EngineRun, request
from tests.support.models import Reference, tiny_model_folder


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompt_after_a_compiled_text_equals_the_whole_text(family: str, tmp_path: Path) -> None:
    folder = tiny_model_folder(family, tmp_path / "model")
    model = load_model(ModelConfig(model=str(folder)))
    text = list(range(100, 177))
    prompt = [9, 8, 7]
    with EngineRun(model, tmp_path / "store", max_num_batched_tokens=16) as run:
        capture = request("c", None, text, max_new_tokens=0)
        run.submit([_capturing(capture)])
        run.run()
        compiled = run.results["c"].finish.compiled
        assert compiled is not None
        blob = tmp_path / "compiled.safetensors"
        sha256 = write_prefix(
            blob,
            {
                name: PrefixArray.of(np.frombuffer(data, np.float32).reshape(compiled.shape))
                for name, data in (
                    ("decoder.key", compiled.key),
                    ("decoder.value", compiled.value),
                )
            },
            query_offset=len(text),
            source_format="compiled",
        )
        version = validate_file(blob).version_record(sha256, blob.stat().st_size)
        run.server.registry.publish("default", "t", blob, version)
        run.submit([request("r", "t", prompt, max_new_tokens=16)])
        run.run()
        got = run.results["r"]
    tokens, logprobs = Reference(folder).generate(None, text + prompt, 16)
    assert got.ids == tokens
    assert [token.logprob for token in got.tokens] == pytest.approx(logprobs, abs=1e-4)


def _capturing(request):  # type: ignore[no-untyped-def]
    import dataclasses

    return dataclasses.replace(request, capture_kv=True)
