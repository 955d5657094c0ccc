"""Trained as PEFT trains it: the same start, data and optimiser give the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch.nn.functional import cross_entropy

from prefixd_train.inject import target_logits
from prefixd_train.lm import load_lm
from prefixd_train.parameterise import PrefixParameters, make_prefix
from tests.support.models import load_base
from tests.support.training import batch_of, rows, tiny_lm_folder

P, HIDDEN, STEPS = 6, 24, 50


def copy_start(prefix: PrefixParameters, encoder: Any, *, projected: bool) -> None:
    theirs = {"decoder": encoder.embedding.weight}
    if projected:
        theirs = {
            "decoder_input.weight": encoder.embedding.weight,
            **{f"decoder.{name}": value for name, value in encoder.transform.named_parameters()},
        }
    prefix.load_state_dict({name: value.detach().clone() for name, value in theirs.items()})


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_losses_for_fifty_steps(family: str, projected: bool, tmp_path: Path) -> None:
    folder = tiny_lm_folder(family, tmp_path)
    lm = load_lm(str(folder))
    torch.manual_seed(0)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        prefix_projection=projected,
        encoder_hidden_size=HIDDEN,
    )
    peft = get_peft_model(load_base(folder), config).eval()
    encoder = peft.prompt_encoder["default"]
    prefix = make_prefix(
        lm.shapes,
        {"decoder": P},
        "mlp" if projected else "direct",
        hidden=encoder.embedding.weight.shape[1],
        middle=HIDDEN,
    )
    copy_start(prefix, encoder, projected=projected)

    batches = [batch_of(lm, rows(i, 5, 3, 8), rows(100 + i, 4, 6, 2)) for i in range(5)]
    ours = torch.optim.AdamW(prefix.parameters(), lr=5e-3)
    theirs = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=5e-3)
    before = lm.checksum()
    curve = []
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        logits, targets, _ = target_logits(lm, batch, prefix())
        losses = (
            cross_entropy(logits, targets),
            peft(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
            ).loss,
        )
        for optimizer, loss in zip((ours, theirs), losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        curve.append([loss.item() for loss in losses])
    measured = torch.tensor(curve)
    torch.testing.assert_close(measured[:, 0], measured[:, 1], rtol=0, atol=1e-4)
    assert measured[-5:].mean() < measured[:5].mean() - 0.1, "nothing was learned"
    assert lm.checksum() == before
