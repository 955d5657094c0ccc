"""Which encoder-decoders are served, what is known of them, and why others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LongT5Config,
    M2M100Config,
    PegasusXConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from prefixd_server.config import ModelConfig
from prefixd_server.errors import UnsupportedModel
from prefixd_server.models.loader import LoadedModel, load_model
from prefixd_server.models.seq2seq import DecoderRules
from prefixd_store.geometry import SiteGeometry
from tests.support.models import demo_folder
from tests.support.seq2seq import tiny_seq2seq_folder
from tests.support.threads import one_thread

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


def load(folder: Path, **config: Any) -> LoadedModel:
    return load_model(ModelConfig(model=str(folder), device="cpu", **config))


def test_what_is_known_of_a_bart(tmp_path: Path) -> None:
    model = load(tiny_seq2seq_folder("bart", tmp_path))
    geometry = model.geometry
    assert geometry.decoder == (2, 4, 8)
    assert geometry.encoder == SiteGeometry(3, 4, 8)
    assert geometry.num_kv_layers == 3
    assert geometry.encoder_starts_at_zero
    assert model.max_model_len == 512
    assert model.decoder_rules == DecoderRules(start=2, first=(0,), last=(2,))


def test_a_t5_has_no_longest_context(tmp_path: Path) -> None:
    folder = tiny_seq2seq_folder("t5", tmp_path)
    model = load(folder, max_model_len=100_000)
    assert model.max_model_len == 100_000
    assert not model.geometry.encoder_starts_at_zero
    assert model.geometry.encoder == SiteGeometry(2, 4, 8)


def test_a_bart_has_no_more_than_its_positions(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="own context is 512"):
        load(tiny_seq2seq_folder("bart", tmp_path), max_model_len=513)


def test_half_precision_is_served(tmp_path: Path) -> None:
    assert (
        str(load(tiny_seq2seq_folder("t5", tmp_path), dtype="bfloat16").dtype) == "torch.bfloat16"
    )


_SMALL = {"vocab_size": 49152, "d_model": 16, "decoder_start_token_id": 2}
_BART = {
    **_SMALL,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            LongT5Config(**_SMALL, d_kv=4, d_ff=16, num_layers=1, num_heads=4),
            "LongT5ForConditionalGeneration cannot be served: .*attention modules are not those",
        ),
        (M2M100Config(**_BART), "M2M100ForConditionalGeneration cannot be served: "),
        (
            PegasusXConfig(**_BART),
            "PegasusXForConditionalGeneration cannot be served: 2 of its 3 attentions",
        ),
    ],
)
def test_families_that_cannot_work_are_refused_by_name(
    config: Any, reason: str, tmp_path: Path
) -> None:
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo_folder()).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=reason):
        load(tmp_path)


def test_a_decoder_that_does_not_say_how_it_begins(tmp_path: Path) -> None:
    folder = tiny_seq2seq_folder("t5", tmp_path, decoder_start_token_id=None)
    with pytest.raises(UnsupportedModel, match="decoder_start_token_id is None"):
        load(folder)


def test_speech_is_not_text(tmp_path: Path) -> None:
    config = WhisperConfig(**{**_BART, "vocab_size": 51865})
    WhisperForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"cannot be read as a model: .*Whisper"):
        load(tmp_path)
