"""What is trained is what is served: the engine gives the trainer's log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from prefixd_server.config import ModelConfig
from prefixd_server.models.loader import load_model
from prefixd_store import validate_file
from prefixd_train.ablations import EmbeddingPrefix
from prefixd_train.initialise import from_tokens
from prefixd_train.inject import target_logits
from prefixd_train.lm import FrozenLM, load_lm
from prefixd_train.parameterise import PrefixParameters, make_prefix
from prefixd_train.save import save_prefix
from prefixd_train.sites import Site
from tests.support.engine import EngineRun, request
from tests.support.training import SITES_OF, batch_of, rows, tiny_lm_folder

P = 11
TOLERANCE = 1e-4
TARGET = 7


def publish(run: EngineRun, task: str, lm: FrozenLM, prefix: PrefixParameters, to: Path) -> None:
    blob = to / f"{task}.safetensors"
    sha256 = save_prefix(blob, lm, prefix, training={})
    version = validate_file(blob).version_record(sha256, blob.stat().st_size)
    run.server.registry.publish("default", task, blob, version)


def trained(
    lm: FrozenLM, sites: tuple[Site, ...] | Mapping[Site, int], parameterisation: str
) -> PrefixParameters:
    """As after some training: near the LM's own activations, but not them."""
    lengths = sites if isinstance(sites, Mapping) else dict.fromkeys(sites, P)
    prefix = make_prefix(lm.shapes, lengths, parameterisation)  # type: ignore[arg-type]
    prefix.set_kv(from_tokens(lm, rows(9, max(lengths.values()))[0], lengths))
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter += 0.05 * float(parameter.std()) * torch.randn_like(parameter)
    return prefix


@torch.no_grad()
def logprobs(
    lm: FrozenLM, prefix: PrefixParameters, sources: list[list[int]], targets: list[list[int]]
) -> list[list[float]]:
    """Of all targets, in one padded batch."""
    found = target_logits(lm, batch_of(lm, sources, targets), prefix.eval()())
    chosen = torch.log_softmax(found.logits, -1).gather(1, found.targets[:, None])[:, 0]
    return [part.tolist() for part in chosen.split([len(target) for target in targets])]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_a_decoder_only_lm(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tiny_lm_folder(family, tmp_path / "model")
    lm = load_lm(str(folder))
    prefixes = {
        "direct": trained(lm, ("decoder",), "direct"),
        "mlp": trained(lm, ("decoder",), "mlp"),
        "embeddings": EmbeddingPrefix(lm, P),
    }
    sources, targets = rows(1, 4, 30, 17), rows(2, TARGET, 3, 12)
    with EngineRun(load_model(ModelConfig(model=str(folder))), tmp_path / "store") as run:
        for task, prefix in prefixes.items():
            publish(run, task, lm, prefix, tmp_path)
            run.submit(
                request(f"{task}{i}", task, s + t, prompt_logprobs=True, max_new_tokens=1)
                for i, (s, t) in enumerate(zip(sources, targets, strict=True))
            )
        run.run()
    for task, prefix in prefixes.items():
        for i, expected in enumerate(logprobs(lm, prefix, sources, targets)):
            started = run.results[f"{task}{i}"].started
            assert started is not None
            served = started.prompt_logprobs[-len(targets[i]) :]
            assert list(served) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_of_an_encoder_decoder_at_each_site(family: str, tmp_path: Path) -> None:
    """Its prompts have no log-probabilities: the engine writes, the trainer reads what it wrote."""
    torch.manual_seed(0)
    folder = tiny_lm_folder(family, tmp_path / "model")
    lm = load_lm(str(folder))
    sites = SITES_OF[family]
    prefixes = {site: trained(lm, (site,), "direct") for site in sites}
    prefixes |= {"all": trained(lm, sites, "mlp"), "both": trained(lm, sites[::2], "direct")}
    several: dict[Site, int] = {"encoder": 20, "decoder": 10, "cross": 5}
    prefixes |= {
        "several": trained(lm, several, "direct"),
        "several-mlp": trained(lm, {"encoder": 3, "decoder": 7, "cross": 21}, "mlp"),
        "two": trained(lm, {"decoder": 3, "cross": 21}, "direct"),
        "encoder-and-cross": trained(lm, {"encoder": 7, "cross": 21}, "direct"),
    }
    texts = rows(1, 5, 19)
    with EngineRun(load_model(ModelConfig(model=str(folder))), tmp_path / "store") as run:
        for task, prefix in prefixes.items():
            publish(run, task, lm, prefix, tmp_path)
            run.submit(
                request(f"{task}{i}", task, text, max_new_tokens=TARGET, temperature=1.0, seed=i)
                for i, text in enumerate(texts)
            )
        run.run()
    for task, prefix in prefixes.items():
        written = [run.results[f"{task}{i}"].tokens for i in range(len(texts))]
        targets = [[token.id for token in tokens] for tokens in written]
        expected = logprobs(lm, prefix, texts, targets)
        for tokens, theirs in zip(written, expected, strict=True):
            # BART's first and last tokens are forced, whatever their probability.
            inner = slice(1, -1) if family == "bart" else slice(None)
            served = [token.logprob for token in tokens]
            assert served[inner] == pytest.approx(theirs[inner], abs=TOLERANCE)
