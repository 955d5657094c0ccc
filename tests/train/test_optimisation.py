"""What the optimiser's settings do, against transformers' schedules and arithmetic by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from torch import Tensor

from prefixd_train import recompute
from prefixd_train.batching import Batch
from prefixd_train.initialise import from_prefix_file
from prefixd_train.lm import FrozenLM
from prefixd_train.loop import Trainer
from prefixd_train.run_folder import RunFolder
from prefixd_train.sites import PrefixKV
from prefixd_train.start import start_prefix
from prefixd_train.train import train
from tests.train.conftest import Options
from tests.train.test_loop import examples_of

STEPS = 20


def sloped(slope: float) -> Callable[[FrozenLM, Batch, PrefixKV | None], tuple[Tensor, int]]:
    """An objective whose gradient is ``slope`` for each value of the prefix."""

    def objective(lm: FrozenLM, batch: Batch, prefix: PrefixKV | None) -> tuple[Tensor, int]:
        assert prefix is not None
        return slope * torch.stack([part.sum() for part in prefix["decoder"]]).sum(), 1

    return objective


def trainer_of(lm: FrozenLM, options: Options, slope: float, **settings: Any) -> Trainer:
    asked = options(batch_size=8, schedule="constant", warmup=0.0, init="random", **settings)
    examples = examples_of(lm)
    torch.manual_seed(0)
    prefix = start_prefix(asked, lm, {"decoder": 4}, examples)
    return Trainer(lm, prefix, examples, asked, objective=sloped(slope))


def values(trainer: Trainer) -> Tensor:
    """[L, H_kv, P, D], the keys and the values one after the other"""
    return torch.cat([part.detach() for part in trainer.prefix()["decoder"]]).clone()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_learning_rate_goes_as_transformers_has_it(
    llama: FrozenLM, options: Options, tmp_path: Path, schedule: str
) -> None:
    """Step by step, after a warm-up of a quarter of the steps."""
    train(
        options(schedule=schedule, warmup=0.25, lr=0.5, max_steps=STEPS, log_every=1),
        objective=sloped(1.0),
    )
    logged = [line["lr"] for line in RunFolder(tmp_path / "run").read_metrics()]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    of = {
        "linear": lambda: transformers.get_linear_schedule_with_warmup(optimizer, 5, STEPS),
        "cosine": lambda: transformers.get_cosine_schedule_with_warmup(optimizer, 5, STEPS),
        "constant": lambda: transformers.get_constant_schedule_with_warmup(optimizer, 5),
    }[schedule]()
    expected = []
    for _ in range(STEPS):
        expected += of.get_last_lr()
        optimizer.step()
        of.step()
    assert logged == pytest.approx(expected)
    assert logged[:6] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert logged[-1] == pytest.approx(
        {"linear": 1 / 30, "cosine": 0.0055, "constant": 0.5}[schedule], rel=0.01
    )


def test_weight_decay_is_a_share_of_the_learning_rate(llama: FrozenLM, options: Options) -> None:
    """Without a gradient nothing else moves the values (decoupled, as in AdamW)."""
    trainer = trainer_of(llama, options, 0.0, weight_decay=0.3, lr=0.1, max_steps=5)
    before = values(trainer)
    trainer.run()
    torch.testing.assert_close(values(trainer), before * (1 - 0.1 * 0.3) ** 5)
    still = trainer_of(llama, options, 0.0, lr=0.1, max_steps=5)
    still.run()
    torch.testing.assert_close(values(still), before)


@pytest.mark.parametrize(("most", "clipped"), [(0.5, True), (1e6, False)])
def test_the_gradient_is_clipped_to_its_norm(
    llama: FrozenLM, options: Options, most: float, clipped: bool
) -> None:
    """AdamW's first moment after one step is a tenth of the gradient that it was given."""
    trainer = trainer_of(llama, options, 3.0, max_grad_norm=most, max_steps=1)
    whole = 3.0 * values(trainer).numel() ** 0.5
    _, tokens = trainer._backward(trainer._batches_of(0))
    assert trainer._apply_gradients(tokens) == pytest.approx(whole)
    (state,) = trainer._optimizer.state_dict()["state"].values()
    norm = float(state["exp_avg"].norm()) / 0.1
    assert norm == pytest.approx(most if clipped else whole, rel=1e-4)


def test_recomputing_layers_trains_the_same_prefix(
    llama: FrozenLM, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recomputed = Mock(wraps=recompute.checkpoint)
    monkeypatch.setattr(recompute, "checkpoint", recomputed)
    prefixes = []
    for wanted in (False, True):
        out = tmp_path / f"{wanted}"
        trained = train(options(out=out, lr=0.1, gradient_checkpointing=wanted))
        assert trained is not None
        assert recomputed.called == wanted
        prefixes.append(from_prefix_file(llama, trained.prefix)["decoder"])
    start = start_prefix(options(lr=0.1), llama, {"decoder": 4}, examples_of(llama))
    assert not torch.allclose(prefixes[0][0], start()["decoder"][0], atol=0.1)
    torch.testing.assert_close(prefixes[1], prefixes[0], rtol=0, atol=1e-5)
