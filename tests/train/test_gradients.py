"""The prefix's gradient is that of finite differences, whatever holds it and wherever it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from prefixd_train.ablations import EmbeddingPrefix, Infix
from prefixd_train.batching import Batch
from prefixd_train.inject import target_logits
from prefixd_train.lm import FrozenLM
from prefixd_train.objective import negative_log_likelihood
from prefixd_train.parameterise import PrefixParameters, make_prefix
from prefixd_train.sites import Site
from tests.support.training import SITES_OF, batch_of, rows, tiny_lm

P = 3
CASES = [(family, (site,)) for family, sites in SITES_OF.items() for site in sites]
CASES += [(family, SITES_OF[family]) for family in ("t5", "bart")]


@pytest.fixture(scope="module")
def lms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FrozenLM]:
    folder = tmp_path_factory.mktemp("models")
    found = {family: tiny_lm(family, folder / family, dtype="float64") for family in SITES_OF}
    for lm in found.values():
        for module in lm.module.modules():
            if type(module).__name__ in ("LlamaRMSNorm", "T5LayerNorm"):
                module.forward = _norm_in_float64(module)
    return found


def _norm_in_float64(norm: Any) -> Callable[[Tensor], Tensor]:
    """Theirs round to float32 on the way, which finite differences would show."""

    def forward(states: Tensor) -> Tensor:
        variance = states.pow(2).mean(-1, keepdim=True)
        return norm.weight * states * torch.rsqrt(variance + norm.variance_epsilon)

    return forward


def padded_batch(lm: FrozenLM) -> Batch:
    return batch_of(lm, rows(1, 5, 2), rows(2, 3, 4))


def check(lm: FrozenLM, prefix: PrefixParameters) -> None:
    prefix = prefix.double()
    names, values = zip(*prefix.named_parameters(), strict=True)
    batch = padded_batch(lm)

    def loss(*parameters: Tensor) -> Tensor:
        torch.manual_seed(5)  # the same dropout each time
        kv = functional_call(prefix, dict(zip(names, parameters, strict=True)))
        logits, targets, _ = target_logits(lm, batch, kv)
        return torch.nn.functional.cross_entropy(logits, targets)

    assert torch.autograd.gradcheck(loss, values, fast_mode=True)
    before = lm.checksum()
    loss(*values).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in values)
    assert lm.checksum() == before
    assert not any(weight.requires_grad for weight in lm.module.parameters())
    assert all(weight.grad is None for weight in lm.module.parameters())


@pytest.mark.parametrize("parameterisation", ["direct", "mlp", "mlp-deep"])
@pytest.mark.parametrize(("family", "sites"), CASES)
def test_of_each_parameterisation_at_each_site(
    lms: dict[str, FrozenLM], family: str, sites: tuple[Site, ...], parameterisation: str
) -> None:
    torch.manual_seed(0)
    lm = lms[family]
    lengths = dict.fromkeys(sites, P)
    check(lm, make_prefix(lm.shapes, lengths, parameterisation, hidden=6, middle=5))  # type: ignore[arg-type]


OTHERS: dict[str, Callable[[FrozenLM], PrefixParameters]] = {
    "dropout": lambda lm: make_prefix(lm.shapes, {"decoder": P}, dropout=0.4),
    "frozen-first": lambda lm: make_prefix(lm.shapes, {"decoder": P}, frozen_first=1),
    "embedding-only": lambda lm: EmbeddingPrefix(lm, P),
    "infix": lambda lm: Infix(make_prefix(lm.shapes, {"decoder": P})),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_the_variants(lms: dict[str, FrozenLM], family: str, name: str) -> None:
    torch.manual_seed(0)
    check(lms[family], OTHERS[name](lms[family]))


@pytest.mark.parametrize("family", SITES_OF)
def test_of_a_padded_batch_is_the_sum_over_its_rows(lms: dict[str, FrozenLM], family: str) -> None:
    torch.manual_seed(0)
    lm = lms[family]
    prefix = make_prefix(lm.shapes, dict.fromkeys(SITES_OF[family], P)).double()
    sources, targets = rows(1, 5, 2, 9), rows(2, 3, 4, 1)

    def gradients(batch: Batch) -> list[Tensor]:
        loss, _ = negative_log_likelihood(lm, batch, prefix())
        return list(torch.autograd.grad(loss, list(prefix.parameters())))

    alone = [gradients(batch_of(lm, [s], [t])) for s, t in zip(sources, targets, strict=True)]
    together = gradients(batch_of(lm, sources, targets))
    for parts, whole in zip(zip(*alone, strict=True), together, strict=True):
        # The loss sums logits in float32.
        torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-5, atol=1e-6)
