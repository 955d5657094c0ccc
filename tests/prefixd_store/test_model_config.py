"""The sizes of a config.json, in the words of each family that saves one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from prefixd_store import Geometry, InvalidRequest, SiteGeometry, geometry_folder

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
TWO_SIDED = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("GPT2Config", {"n_embd": 32, "n_layer": 3, "n_head": 4}, Geometry(3, 4, 8)),
        ("GPTBigCodeConfig", {"n_embd": 32, "n_layer": 3, "n_head": 4}, Geometry(3, 1, 8)),
        ("GPTNeoXConfig", SIZES, Geometry(3, 4, 8)),
        ("OPTConfig", SIZES, Geometry(3, 4, 8)),
        ("LlamaConfig", SIZES | {"num_key_value_heads": 2}, Geometry(3, 2, 8)),
        ("Qwen3Config", SIZES | {"num_key_value_heads": 2, "head_dim": 16}, Geometry(3, 2, 16)),
        ("Gemma2Config", SIZES | {"num_key_value_heads": 2, "head_dim": 16}, Geometry(3, 2, 16)),
        ("BartConfig", TWO_SIDED, Geometry(3, 4, 8, encoder=SiteGeometry(2, 2, 16))),
        ("MBartConfig", TWO_SIDED, Geometry(3, 4, 8, encoder=SiteGeometry(2, 2, 16))),
        ("PegasusConfig", TWO_SIDED, Geometry(3, 4, 8, encoder=SiteGeometry(2, 2, 16))),
        ("MarianConfig", TWO_SIDED, Geometry(3, 4, 8, encoder=SiteGeometry(2, 2, 16))),
        (
            "T5Config",
            {"d_model": 32, "d_kv": 16, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 3},
            Geometry(3, 4, 16, encoder=SiteGeometry(2, 4, 16)),
        ),
    ],
)
def test_a_family(tmp_path: Path, name: str, sizes: dict[str, Any], expected: Geometry) -> None:
    getattr(transformers, name)(**sizes).save_pretrained(tmp_path)
    assert geometry_folder(tmp_path) == expected


def test_the_language_model_of_one_that_also_sees(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": SIZES, "vision_config": {}}))
    assert geometry_folder(tmp_path) == Geometry(3, 4, 8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json: not valid JSON"),
        ("{}", "none of num_attention_heads, n_head, num_heads"),
        (
            json.dumps(SIZES | {"num_hidden_layers": "3"}),
            "num_hidden_layers is 3, expected a count",
        ),
        (json.dumps(SIZES | {"num_attention_heads": 0}), "num_attention_heads is 0"),
    ],
)
def test_a_config_without_the_sizes(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InvalidRequest, match=message) as error:
        geometry_folder(tmp_path)
    assert error.value.param == "base"
