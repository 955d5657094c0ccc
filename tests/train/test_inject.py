"""A prefix in the trainer is a prefix in transformers' own cache, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from prefixd_train.inject import forward, target_logits
from prefixd_train.lm import UnsupportedModel, load_lm
from prefixd_train.sites import InfixKV, PrefixKV
from tests.support.families import FAMILIES, REFUSED, VOCAB, WINDOW
from tests.support.training import IGNORED, SITES_OF, batch_of, rows, tiny_lm

P = 5
TOLERANCE = 1e-4


def random_kv(shapes: Any, length: int = P) -> PrefixKV:
    torch.manual_seed(3)
    return {
        site: (
            torch.randn(shape.num_layers, shape.num_kv_heads, length, shape.head_dim),
            torch.randn(shape.num_layers, shape.num_kv_heads, length, shape.head_dim),
        )
        for site, shape in shapes.items()
    }


@torch.inference_mode()
@pytest.mark.parametrize("title", FAMILIES)
def test_every_family_sees_it_as_its_own_cache(title: str, tmp_path: Path) -> None:
    folder = FAMILIES[title].save(tmp_path)
    lm = load_lm(str(folder))
    prefix = random_kv(lm.shapes)
    batch = batch_of(lm, rows(1, WINDOW + 4, 3, vocab=VOCAB), rows(2, 6, 4, vocab=VOCAB))
    ours = forward(lm, batch, prefix)

    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    for row, mask in enumerate(batch.attention_mask):
        # A cache that is told of the model's sliding windows would forget the first tokens.
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(*prefix["decoder"], strict=True)):
            cache.update(key[None], value[None], layer)
        length = int(mask.sum())
        theirs = reference(batch.input_ids[row : row + 1, :length], past_key_values=cache).logits
        torch.testing.assert_close(ours[row, :length], theirs[0], rtol=0, atol=TOLERANCE)

    # What a family does to its logits is done to chosen rows as well.
    found = target_logits(lm, batch, prefix)
    wanted = batch.labels[:, 1:] != IGNORED
    torch.testing.assert_close(found.logits, ours[:, :-1][wanted], rtol=0, atol=1e-5)
    assert found.targets.tolist() == batch.labels[:, 1:][wanted].tolist()
    assert found.examples.tolist() == wanted.nonzero()[:, 0].tolist()


@torch.inference_mode()
@pytest.mark.parametrize("family", SITES_OF)
def test_without_a_prefix_it_is_the_model_itself(family: str, tmp_path: Path) -> None:
    lm = tiny_lm(family, tmp_path)
    batch = batch_of(lm, rows(1, 7, 7), rows(2, 3, 3))
    ours = forward(lm, batch, None)
    lm.module.set_attn_implementation("eager")
    arguments = {"input_ids": batch.input_ids}
    if batch.decoder_input_ids is not None:
        arguments["decoder_input_ids"] = batch.decoder_input_ids
    torch.testing.assert_close(ours, lm.module(**arguments).logits, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_infix_is_what_those_tokens_would_be_between_input_and_output(
    family: str, tmp_path: Path
) -> None:
    """The oracle is transformers' cache: the input, then the infix, and the output reads both."""
    lm = tiny_lm(family, tmp_path)
    (source,), (target,) = rows(1, 6), rows(2, 4)
    batch = batch_of(lm, [source], [target])
    prefix = random_kv(lm.shapes)
    infix = forward(lm, batch, InfixKV(prefix))[0]
    plain = forward(lm, batch, None)[0]
    # Before the position that predicts the first target, the infix is not seen.
    torch.testing.assert_close(infix[: len(source) - 1], plain[: len(source) - 1])
    assert (infix[len(source) - 1 :] - plain[len(source) - 1 :]).abs().max() > 1e-2

    # The rest is the model with the input, then the infix, then the output in its cache.
    lm.module.set_attn_implementation("eager")
    cache = DynamicCache()
    head, tail = batch.input_ids[:, : len(source) - 1], batch.input_ids[:, len(source) - 1 :]
    lm.module(head, past_key_values=cache, use_cache=True)
    for layer, (key, value) in enumerate(zip(*prefix["decoder"], strict=True)):
        cache.update(key[None], value[None], layer)
    theirs = lm.module(tail, past_key_values=cache, use_cache=True).logits[0]
    torch.testing.assert_close(infix[len(source) - 1 :], theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "title", ["Bloom", "gpt-oss", "Llama 4", "PhiMoE with a sliding window", "DeepSeek-V3", "Mamba"]
)
def test_a_family_with_other_attention_is_refused(title: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel):
        load_lm(str(REFUSED[title].save(tmp_path)))


def test_an_infix_of_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    lm = tiny_lm("t5", tmp_path)
    batch = batch_of(lm, rows(1, 3), rows(2, 3))
    with pytest.raises(ValueError, match="decoder-only"):
        forward(lm, batch, InfixKV())


def test_the_model_alone_says_what_it_misses(tmp_path: Path) -> None:
    lm = tiny_lm("llama", tmp_path)
    with pytest.raises(RuntimeError, match="prefixd_train"):
        lm.module(torch.tensor([[5, 6]]))
