"""PEFT on encoder-decoders, against PEFT itself: which saved pair each decoder layer gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    EncoderDecoderCache,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from prefixd_store import (
    Geometry,
    InvalidPrefix,
    Prefix,
    SiteGeometry,
    export_peft,
    import_checkpoint,
    parse_prefix,
)
from tests.prefixd_store.checkpoints import files_of, save_peft, tiny_model, to_torch


def bart(encoder: int = 4, decoder: int = 4) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"encoder_layers": encoder, "decoder_layers": decoder}
    heads: dict[str, Any] = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    widths: dict[str, Any] = {"d_model": 32, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return BartForConditionalGeneration(BartConfig(vocab_size=32, **sizes, **heads, **widths))


def t5(layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=16, num_layers=layers, num_heads=4)
    return T5ForConditionalGeneration(config)


def geometry(layers: int, encoder: int | None = None) -> Geometry:
    return Geometry(layers, 4, 8, encoder=SiteGeometry(encoder or layers, 4, 8))


def saved(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)
    peft_model = get_peft_model(model.to(dtype), config, autocast_adapter_dtype=False).eval()
    peft_model.prompt_encoder.to(dtype)
    peft_model.save_pretrained(folder)
    return peft_model


def imported(folder: Path, out: Path, model: Geometry) -> Prefix:
    import_checkpoint(files_of(folder), out, geometry=model)
    return parse_prefix(out.read_bytes())


def prompt_of(peft_model: PeftModel, num_layers: int) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        cache = peft_model.get_prompt(batch_size=1)
    assert isinstance(cache, EncoderDecoderCache)
    assert cache.cross_attention_cache.get_seq_length() == 0
    layers = cache.self_attention_cache.layers[:num_layers]
    return torch.stack([x.keys[0] for x in layers]), torch.stack([x.values[0] for x in layers])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda n: bart(n, n), t5], ids=["bart", "t5"])
@pytest.mark.parametrize("layers", [1, 3, 4])
def test_the_decoder_gets_what_peft_gives_it(
    tmp_path: Path, layers: int, make: Any, dtype: torch.dtype
) -> None:
    model = saved(make(layers), tmp_path / "c", dtype)
    prefix = imported(tmp_path / "c", tmp_path / "out", geometry(layers))
    for part, theirs in zip(("key", "value"), prompt_of(model, layers), strict=True):
        assert torch.equal(to_torch(prefix.arrays[f"decoder.{part}"]), theirs)
    assert prefix.manifest.sites == {"decoder": (layers, 4, 5, 8)}
    assert prefix.manifest.query_offset == 5
    layer_map = prefix.manifest.provenance["layer_map"]
    assert layer_map == {1: [0], 3: [0, 2, 1], 4: [0, 2, 0, 2]}[layers]


def test_a_decoder_with_fewer_layers_than_the_encoder(tmp_path: Path) -> None:
    model = saved(bart(4, 3), tmp_path / "c")
    prefix = imported(tmp_path / "c", tmp_path / "out", geometry(3, 4))
    assert torch.equal(to_torch(prefix.arrays["decoder.key"]), prompt_of(model, 3)[0])
    assert prefix.manifest.provenance["layer_map"] == [0, 2, 0]


def test_a_decoder_with_more_layers_than_the_encoder(tmp_path: Path) -> None:
    saved(bart(2, 4), tmp_path / "c")
    with pytest.raises(InvalidPrefix, match=r"num_layers 2, but the decoder has 4 layers"):
        imported(tmp_path / "c", tmp_path / "out", geometry(4, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [3, 4])
def test_round_trip_through_peft(tmp_path: Path, layers: int, dtype: torch.dtype) -> None:
    model = saved(bart(layers, layers), tmp_path / "c", dtype)
    first = imported(tmp_path / "c", tmp_path / "1", geometry(layers))
    export_peft(first, tmp_path / "exported")
    second = imported(tmp_path / "exported", tmp_path / "2", geometry(layers))
    for name, array in first.arrays.items():
        assert array.data.tobytes() == second.arrays[name].data.tobytes()

    base = bart(layers, layers).to(dtype).eval()
    loaded = PeftModel.from_pretrained(base, tmp_path / "exported", autocast_adapter_dtype=False)
    for ours, theirs in zip(prompt_of(loaded, layers), prompt_of(model, layers), strict=True):
        assert torch.equal(ours, theirs)
    source = torch.tensor([[5, 9, 7, 2]])
    tokens = [
        m.generate(input_ids=source, max_new_tokens=6, do_sample=False) for m in (loaded, model)
    ]
    assert torch.equal(*tokens)


def test_layers_that_peft_cannot_repeat(tmp_path: Path) -> None:
    save_peft(tmp_path / "c", family="gpt2")
    prefix = imported(tmp_path / "c", tmp_path / "out", Geometry(2, 4, 8))
    with pytest.raises(InvalidPrefix, match="layers 0 and 1 the same keys"):
        export_peft(prefix, tmp_path / "exported", encoder_decoder=True)
    assert not (tmp_path / "exported").exists()


def test_a_prefix_for_the_other_kind_of_model(tmp_path: Path) -> None:
    saved(t5(2), tmp_path / "two")
    with pytest.raises(InvalidPrefix, match=r"an encoder-decoder model .* this is a decoder-only"):
        imported(tmp_path / "two", tmp_path / "out", Geometry(2, 4, 8))
    save_peft(tmp_path / "one", family="gpt2")
    assert tiny_model("gpt2").config.n_layer == 2
    with pytest.raises(InvalidPrefix, match=r"a decoder-only model .* this is an encoder-decoder"):
        imported(tmp_path / "one", tmp_path / "out", geometry(2))
