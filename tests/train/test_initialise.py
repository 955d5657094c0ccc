"""A prefix that starts from a text is the LM with that text in its context."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prefixd_train.ablations import EmbeddingPrefix
from prefixd_train.batching import Batch
from prefixd_train.initialise import (
    activations_of_tokens,
    from_prefix_file,
    from_text,
    from_words,
)
from prefixd_train.inject import forward
from prefixd_train.lm import FrozenLM, load_lm
from prefixd_train.loop import Trainer
from prefixd_train.parameterise import FIT_TOLERANCE, Parameterisation, make_prefix
from prefixd_train.prepare import read_data
from prefixd_train.save import fold, save_prefix
from prefixd_train.sites import PrefixKV, Site, SiteShape
from prefixd_train.start import prefix_lengths, start_prefix
from tests.support.training import SITES_OF, batch_of, rows, tiny_lm
from tests.train.conftest import Options

TEXT = "The town hall stands at the river; its clock was built in 1873 and still keeps the time."
P = 8
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def lms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FrozenLM]:
    folder = tmp_path_factory.mktemp("models")
    return {family: tiny_lm(family, folder / family) for family in SITES_OF}


def in_context(lm: FrozenLM, tokens: list[int], batch: Batch) -> torch.Tensor:
    """Logits [B, S, V] of the LM that reads ``tokens`` ahead of each row."""
    head = torch.tensor([tokens]).expand(len(batch.input_ids), -1)
    together = Batch(
        torch.cat([head, batch.input_ids], 1),
        torch.cat([torch.ones_like(head), batch.attention_mask], 1),
        torch.cat([torch.full_like(head, -100), batch.labels], 1),
    )
    return forward(lm, together, None)[:, len(tokens) :]


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_first_positions_of_a_text_are_the_text_in_context(
    lms: dict[str, FrozenLM], family: str
) -> None:
    lm = lms[family]
    tokens = lm.tokenizer(TEXT)["input_ids"]
    batch = batch_of(lm, rows(1, 4, 6), rows(2, 3, 2))
    prefix = make_prefix(lm.shapes, {"decoder": len(tokens)})
    prefix.set_kv(from_text(lm, TEXT, prefix.lengths))
    expected = in_context(lm, tokens, batch)
    torch.testing.assert_close(forward(lm, batch, prefix()), expected, rtol=0, atol=TOLERANCE)
    # The last layer of an MLP is solved for the same values.
    for kind in ("mlp", "mlp-deep"):
        mlp = make_prefix(lm.shapes, prefix.lengths, kind, hidden=32, middle=64)  # type: ignore[arg-type]
        mlp.set_kv(prefix())
        torch.testing.assert_close(forward(lm, batch, mlp()), expected, rtol=0, atol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_words_repeat_up_to_the_length(lms: dict[str, FrozenLM], family: str) -> None:
    lm = lms[family]
    words = lm.tokenizer("summarize this", add_special_tokens=False)["input_ids"]
    repeated = (words * P)[:P]
    assert len(words) < P
    batch = batch_of(lm, rows(1, 4), rows(2, 3))
    ours = forward(lm, batch, from_words(lm, "summarize this", {"decoder": P}))
    torch.testing.assert_close(ours, in_context(lm, repeated, batch), rtol=0, atol=TOLERANCE)

    embeddings = EmbeddingPrefix(lm, P)
    embeddings.set_tokens(repeated)
    torch.testing.assert_close(forward(lm, batch, embeddings()), ours, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_of_an_encoder_decoder_every_site_has_its_own_activations(
    lms: dict[str, FrozenLM], family: str
) -> None:
    """Cross-attention keys are those of the encoder's output: a decoder that has them ahead, and
    nothing else to look at but a text that repeats it, attends to the same."""
    lm = lms[family]
    tokens = lm.tokenizer(TEXT)["input_ids"][:P]
    found = activations_of_tokens(lm, tokens)
    assert {site: list(keys.shape) for site, (keys, _) in found.items()} == {
        site: [shape.num_layers, shape.num_kv_heads, P, shape.head_dim]
        for site, shape in lm.shapes.items()
    }
    batch = batch_of(lm, [tokens], rows(2, 5))
    doubled = forward(lm, batch, {"cross": found["cross"]})
    torch.testing.assert_close(doubled, forward(lm, batch, None), rtol=0, atol=TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_each_site_starts_from_as_many_tokens_as_it_has(
    lms: dict[str, FrozenLM], family: str
) -> None:
    """An encoder that read more would keep other values of the same tokens."""
    lm = lms[family]
    tokens = lm.tokenizer(TEXT)["input_ids"]
    lengths: dict[Site, int] = {"encoder": 7, "decoder": 3, "cross": 12}
    found = from_text(lm, TEXT, lengths)
    assert found.keys() == lengths.keys()
    for site, length in lengths.items():
        torch.testing.assert_close(found[site], activations_of_tokens(lm, tokens[:length])[site])
    words = from_words(lm, TEXT, lengths)
    evenly = from_text(lm, TEXT, lengths, choose="even")
    for site, length in lengths.items():
        assert words[site][0].shape[2] == evenly[site][0].shape[2] == length


@torch.inference_mode()
def test_evenly_chosen_keys_stand_at_their_place_in_the_prefix(lms: dict[str, FrozenLM]) -> None:
    """The first layer's key of a token depends on it and its position alone."""
    lm = lms["llama"]
    tokens = lm.tokenizer(TEXT)["input_ids"]
    chosen = [tokens[-(-place * len(tokens) // P)] for place in range(P)]
    keys, values = from_text(lm, TEXT, {"decoder": P}, choose="even")["decoder"]
    alone_keys, alone_values = activations_of_tokens(lm, chosen)["decoder"]
    torch.testing.assert_close(keys[0], alone_keys[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(values[0], alone_values[0], rtol=0, atol=1e-5)
    assert (values[1] - alone_values[1]).abs().max() > 1e-2, "the whole text was not read"
    everything = from_text(lm, TEXT, {"decoder": len(tokens)}, choose="even")
    first = from_text(lm, TEXT, {"decoder": len(tokens)})
    torch.testing.assert_close(everything["decoder"], first["decoder"])


def test_another_prefix_is_copied_and_its_first_tokens_stay_frozen(
    lms: dict[str, FrozenLM], tmp_path: Path
) -> None:
    lm = lms["gpt2"]
    start: PrefixKV = from_words(lm, "translate", {"decoder": P})
    save_prefix(tmp_path / "a.safetensors", lm, start, training={})
    prefix = make_prefix(lm.shapes, {"decoder": P}, frozen_first=2)
    prefix.set_kv(from_prefix_file(lm, tmp_path / "a.safetensors"))
    torch.testing.assert_close(prefix()["decoder"], start["decoder"])
    for parameter in prefix.parameters():
        with torch.no_grad():
            parameter += 1
    for moved, before in zip(prefix()["decoder"], start["decoder"], strict=True):
        torch.testing.assert_close(moved[:, :, :2], before[:, :, :2])
        torch.testing.assert_close(moved[:, :, 2:], before[:, :, 2:] + 1)


@pytest.mark.parametrize("parameterisation", ["direct", "mlp", "mlp-deep"])
@pytest.mark.parametrize("init", ["random", "words"])
def test_frozen_tokens_stay_as_they_were_initialised(
    options: Options, init: str, parameterisation: str
) -> None:
    settings = options(
        init=init,
        init_text="translate" if init == "words" else None,
        parameterisation=parameterisation,
        frozen_first=2,
        hidden=16,
        middle=16,
        max_steps=3,
    )
    lm = load_lm(settings.model)
    lengths = prefix_lengths(settings, lm)
    examples = read_data(settings, lm, lengths).train
    torch.manual_seed(settings.seed)
    prefix = start_prefix(settings, lm, lengths, examples)
    before = fold(prefix)["decoder"]
    Trainer(lm, prefix, examples, settings).run()
    for first, after in zip(before, fold(prefix)["decoder"], strict=True):
        assert torch.equal(after[:, :, :2], first[:, :, :2])
        assert not torch.equal(after[:, :, 2:], first[:, :, 2:])
    if init == "random":
        frozen, trained = (torch.stack(before)[..., rows, :] for rows in ([0, 1], [2, 3]))
        assert float(frozen.std()) == pytest.approx(float(trained.std()), rel=0.3)
        assert not torch.equal(frozen[..., 0, :], frozen[..., 1, :])


@torch.no_grad()
@pytest.mark.parametrize("parameterisation", ["mlp", "mlp-deep"])
def test_an_mlp_too_narrow_for_its_first_values_says_so(
    parameterisation: Parameterisation, caplog: pytest.LogCaptureFixture
) -> None:
    shapes: dict[Site, SiteShape] = {"decoder": SiteShape(2, 2, 40)}
    kv: PrefixKV = {"decoder": (torch.randn(2, 2, 60, 40), torch.randn(2, 2, 60, 40))}

    def error(middle: int) -> float:
        torch.manual_seed(0)
        mlp = make_prefix(shapes, {"decoder": 60}, parameterisation, hidden=64, middle=middle)
        mlp.set_kv(kv)
        found, wanted = (torch.stack(part["decoder"]) for part in (mlp(), kv))
        return float((found - wanted).norm() / wanted.norm())

    assert error(60) < FIT_TOLERANCE
    assert caplog.messages == []
    narrow = error(40)
    # Of 60 random rows, 41 (one is the bias) can be had.
    assert narrow == pytest.approx((19 / 60) ** 0.5, abs=0.05)
    (said,) = caplog.messages
    assert f"the first decoder values with a relative error of {narrow:.2g}" in said
    assert "for up to 40 virtual tokens (middle), and there are 60" in said


def test_what_does_not_fit_is_refused_by_name(lms: dict[str, FrozenLM], tmp_path: Path) -> None:
    lm = lms["llama"]
    with pytest.raises(ValueError, match=r"has 2 tokens; the prefix takes 9"):
        from_text(lm, "a b", {"decoder": 9})
    with pytest.raises(ValueError, match="no tokens"):
        from_words(lm, "", {"decoder": 2})
    prefix = make_prefix(lm.shapes, {"decoder": 3})
    with pytest.raises(ValueError, match=r"\[3, 2, 4, 8\].*\[3, 2, 3, 8\]"):
        prefix.set_kv(from_words(lm, "a", {"decoder": 4}))
    with pytest.raises(ValueError, match="this LM has decoder"):
        make_prefix(lm.shapes, {"encoder": 3})
    with pytest.raises(ValueError, match="frozen_first is 3 of 3 virtual tokens at cross"):
        make_prefix(lms["t5"].shapes, {"encoder": 4, "cross": 3}, frozen_first=3)
    with pytest.raises(ValueError, match=r"cross values are \[3, 4, 5, 8\].*\[3, 4, 4, 8\]"):
        make_prefix(lms["t5"].shapes, {"cross": 4}).set_kv(from_words(lms["t5"], "a", {"cross": 5}))
    save_prefix(
        tmp_path / "a", lms["gpt2"], from_words(lms["gpt2"], "a", {"decoder": 3}), training={}
    )
    with pytest.raises(ValueError, match="another model"):
        from_prefix_file(lm, tmp_path / "a")
    with pytest.raises(ValueError, match="decoder-only"):
        EmbeddingPrefix(lms["t5"], 3)
