"""A prefix with a length for each site of an encoder-decoder, from settings to the server."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
from torch import Tensor

from prefixd_store import validate_file
from prefixd_train.batching import Batch
from prefixd_train.errors import TrainError
from prefixd_train.lm import FrozenLM, load_lm
from prefixd_train.objective import negative_log_likelihood
from prefixd_train.options import TrainOptions
from prefixd_train.sites import PrefixKV
from prefixd_train.start import prefix_lengths
from prefixd_train.train import train
from tests.support.killed import die, run_until_killed
from tests.support.server import LiveServer
from tests.support.training import tiny_lm_folder
from tests.train.conftest import ROWS, Options, Write, run

SITES = "encoder=20,decoder=10,cross=5"
LENGTHS = {"encoder": 20, "decoder": 10, "cross": 5}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm_folder("t5", tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize(
    ("sites", "lengths"),
    [
        (SITES, LENGTHS),
        ("all", {"decoder": 4, "encoder": 4, "cross": 4}),
        ("cross,encoder", {"encoder": 4, "cross": 4}),
        ("cross,encoder=9", {"encoder": 9, "cross": 4}),
        ("all,encoder=9", {"decoder": 4, "encoder": 9, "cross": 4}),
    ],
)
def test_a_site_without_a_length_takes_that_of_all(
    options: Options, t5: Path, sites: str, lengths: dict[str, int]
) -> None:
    assert prefix_lengths(options(sites=sites), load_lm(str(t5))) == lengths


def test_from_a_file_to_a_task_that_answers(t5: Path, tmp_path: Path, write: Write) -> None:
    settings = {
        "model": t5,
        "data": write(ROWS),
        "task": "e2e",
        "out": tmp_path / "run",
        "sites": SITES,
        "max-steps": 2,
        "device": "cpu",
        "threads": 1,
    }
    with LiveServer(t5, str(tmp_path / "store")) as server, server.client() as client:
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        assert run(["train", *arguments, f"--push={server.url}"]) == 0
        version = client.version("e2e", 1)
        assert version.lengths == LENGTHS
        assert (version.num_virtual_tokens, version.query_offset) == (10, 10)
        card = version.provenance["card"]
        assert "| prefix | virtual tokens: 10 at decoder, 20 at encoder, 5 at cross |" in card
        usage = client.generate("e2e", "name: The Mill", max_new_tokens=2).usage
        assert usage is not None
        assert usage.prefix_tokens == 10


def train_and_die_in_step_3(options: TrainOptions) -> None:
    steps = count(1)

    def objective(lm: FrozenLM, batch: Batch, prefix: PrefixKV | None) -> tuple[Tensor, int]:
        if next(steps) == 3:
            die()
        return negative_log_likelihood(lm, batch, prefix)

    run_until_killed(lambda: train(options, objective=objective))


def test_a_killed_run_goes_on_with_the_same_lengths(
    options: Options, t5: Path, tmp_path: Path
) -> None:
    def of(out: str, *, sites: str = SITES, resume: bool = False) -> TrainOptions:
        return options(
            model=str(t5), out=tmp_path / out, sites=sites, resume=resume, max_steps=4, save_every=2
        )

    whole = train(of("whole"))
    train_and_die_in_step_3(of("killed"))
    with pytest.raises(TrainError, match=r"settings.sites was .*cross=5.*, is .*cross=6"):
        train(of("killed", sites="encoder=20,decoder=10,cross=6", resume=True))
    resumed = train(of("killed", resume=True))
    assert whole is not None
    assert resumed is not None
    assert resumed.prefix.read_bytes() == whole.prefix.read_bytes()
    manifest = validate_file(resumed.prefix)
    assert {site: shape[2] for site, shape in manifest.sites.items()} == LENGTHS
    # What was trained is where another run may start.
    train(options(model=str(t5), sites=SITES, init="prefix", init_from=whole.prefix, max_steps=1))
    with pytest.raises(TrainError, match=r"the cross values are \[3, 4, 5, 8\] .*\[3, 4, 4, 8\]"):
        train(
            options(
                model=str(t5),
                out=tmp_path / "no",
                init="prefix",
                init_from=whole.prefix,
                max_steps=1,
            )
        )
