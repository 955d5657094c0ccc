"""`prefixd evaluate` against a live server: what it asks, what it writes, what it refuses."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu

from prefixd import AsyncClient, Client
from prefixd.cli import main
from prefixd_store import PrefixArray, write_prefix
from prefixd_train.errors import DataError, TrainError
from prefixd_train.evaluate import EvaluateOptions, Evaluation, evaluate
from prefixd_train.template import PromptTemplate
from prefixd_train.testset import groups, read_segments
from tests.support.models import tiny_model_folder
from tests.support.server import LiveServer, wait_until

ROWS: list[dict[str, Any]] = [
    {"source": "name : Blue Spice", "targets": ["Blue Spice is a pub.", "A pub."], "seen": True},
    {"source": "name : Cocum", "target": "Cocum is cheap.", "seen": False, "category": "Food"},
    {"source": "name : Aarhus", "targets": ["Aarhus is a city."], "seen": True, "category": "City"},
    {"source": "name : Wildwood", "targets": ["Wildwood serves pasta."], "category": "Food"},
]
PLAIN = "{source}\n"
SHAPE = (3, 2, 5, 8)
"""[L, H_kv, P, D] of the tiny model's prefix"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("evaluate")
    model = tiny_model_folder("llama", folder / "model")
    with LiveServer(model, str(folder / "store")) as server, server.client() as client:
        push(client, "trained", folder, seed=1, prompt_template="Say: {source}\n")
        push(client, "trained", folder, seed=2, prompt_template="Tell: {source}\n", active=False)
        push(client, "default", folder, seed=3, prompt_template=PLAIN)
        push(client, "foreign", folder, seed=4)
        yield server


def push(
    client: Client, task: str, folder: Path, *, seed: int, active: bool = True, **settings: Any
) -> None:
    path = folder / f"{seed}.safetensors"
    random = np.random.default_rng(seed)
    arrays = {
        f"decoder.{part}": PrefixArray.of(random.standard_normal(SHAPE).astype("float32"))
        for part in ("key", "value")
    }
    trained = {"trainer": "prefixd_train", "training": settings} if settings else {}
    write_prefix(path, arrays, query_offset=SHAPE[2], provenance=trained)
    client.push(task, path, activate=active)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "test.jsonl", ROWS)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(server: LiveServer, task: str, data: Path, **options: Any) -> Evaluation:
    async def evaluated() -> Evaluation:
        options.setdefault("parameters", {"max_new_tokens": 6})
        async with AsyncClient(server.url, max_retries=0) as client:
            return await evaluate(client, EvaluateOptions(task, data, **options))

    return asyncio.run(evaluated())


@pytest.mark.parametrize(
    ("task", "template"),
    [("trained", "Say: {}\n"), ("trained@2", "Tell: {}\n"), ("default", "{}\n")],
)
def test_it_scores_what_is_served(server: LiveServer, data: Path, task: str, template: str) -> None:
    found = run(server, task, data)
    with server.client() as client:
        expected = [
            client.generate(task, template.format(row["source"]), max_new_tokens=6).generated_text
            for row in ROWS
        ]
    assert [generation.generated_text for generation in found.generations] == expected
    assert len(set(expected)) == len(ROWS)
    references = [
        [segment.references[0] for segment in found.segments],
        ["A pub.", None, None, None],
    ]
    bleu = sacrebleu.corpus_bleu([text.strip() for text in expected], references)
    assert found.scores.groups["all"].scores["BLEU"].value == pytest.approx(bleu.score)


def test_the_version_is_chosen_once(server: LiveServer, data: Path, tmp_path: Path) -> None:
    """An activate in the middle of an evaluation changes nothing in it."""
    with server.client() as client:
        push(client, "swapped", tmp_path, seed=5, prompt_template=PLAIN)
        push(client, "swapped", tmp_path, seed=6, prompt_template=PLAIN, active=False)
        before = run(server, "swapped", data)

        async def swapping() -> Evaluation:
            async with AsyncClient(server.url, max_retries=0) as other:
                return await evaluate(
                    other,
                    EvaluateOptions(
                        "swapped", data, parameters={"max_new_tokens": 6}, concurrency=1
                    ),
                    on_output=lambda: client.activate("swapped", 2) and None,
                )

        during = asyncio.run(swapping())
        after = run(server, "swapped", data)
    assert during.version.version == 1
    assert texts(during) == texts(before) != texts(after)


def texts(evaluation: Evaluation) -> list[str]:
    return [generation.generated_text for generation in evaluation.generations]


def test_beams_reach_the_server(server: LiveServer, data: Path) -> None:
    found = run(server, "default", data, parameters={"max_new_tokens": 6, "num_beams": 3})
    with server.client() as client:
        first = client.generate("default", "name : Blue Spice\n", max_new_tokens=6, num_beams=3)
    assert found.generations[0].generated_text == first.generated_text
    assert found.generations[0].score == pytest.approx(first.score)


class CountingClient(AsyncClient):
    now = most = 0

    async def generate(self, *args: Any, **parameters: Any) -> Any:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return await super().generate(*args, **parameters)
        finally:
            self.now -= 1


def test_no_more_requests_in_flight_than_asked_for(server: LiveServer, data: Path) -> None:
    options = EvaluateOptions(
        "default", write(data, ROWS * 4), parameters={"max_new_tokens": 2}, concurrency=3
    )

    async def most() -> int:
        async with CountingClient(server.url, max_retries=0) as client:
            await evaluate(client, options)
            return client.most

    assert asyncio.run(most()) == 3


def test_without_a_known_template_it_asks_for_one(server: LiveServer, data: Path) -> None:
    with pytest.raises(TrainError, match="foreign@1 does not say which prompt template"):
        run(server, "foreign", data)
    assert run(server, "foreign", data, template="{source}").template == "{source}"


def test_a_refused_request_names_the_line_and_ends_the_rest(
    server: LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS, {"source": "too long " * 5000, "target": "x"}, *ROWS * 20]
    path = write(tmp_path / "long.jsonl", rows)
    command = ["evaluate", "--task", "default", "--data", str(path), "--url", server.url]
    assert main([*command, "--max-new-tokens", "6"]) == 1
    assert f"{path}:5: " in "".join(capsys.readouterr().err.split("\n"))
    wait_until(lambda: server.idle, what="the other requests to end")


def test_the_command(
    server: LiveServer, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores"
    command = ["evaluate", "--task", "trained", "--data", str(data), "--url", server.url]
    options = ["--max-new-tokens", "6", "--resamples", "50", "--out", str(out), "--by-category"]
    with pytest.raises(SystemExit) as ended:
        main([*command, *options])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "trained@1, 4 inputs" in printed
    scores = json.loads((out / "scores.json").read_text())
    sizes = {name: group["num_segments"] for name, group in scores["groups"].items()}
    assert sizes == {"all": 4, "seen": 2, "unseen": 1, "category City": 1, "category Food": 2}
    assert scores["prompt_template"] == "Say: {source}\n"
    assert scores["version"] == 1
    chrf = scores["groups"]["all"]["chrF"]
    assert 0 <= chrf["low"] <= chrf["value"] <= chrf["high"] <= 100
    assert "{value:.2f} ({low:.2f} … {high:.2f})".format(**chrf) in printed
    lines = [json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [f"Say: {row['source']}\n" for row in ROWS]
    assert lines[0]["references"] == ROWS[0]["targets"]
    assert (
        f"| all | 4 | {scores['groups']['all']['BLEU']['value']:.2f} ("
        in (out / "scores.md").read_text()
    )
    shutil.rmtree(out)
    with pytest.raises(SystemExit):
        main([*command, *options, "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == scores


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"source": "x"', "test.jsonl:2: not JSON"),
        ('{"source": "x"}', "test.jsonl:2: needs either target or targets"),
        ('{"source": "x", "targets": []}', "test.jsonl:2: targets must be a list"),
        ('{"source": "x", "target": " "}', "test.jsonl:2: target must be a text"),
        ('{"input": "x", "target": "y"}', "test.jsonl:2: has no source"),
        ('{"source": "x", "target": "y", "seen": "yes"}', "test.jsonl:2: seen must be a bool"),
        ('{"source": "x", "target": "y", "category": 3}', "test.jsonl:2: category must be a str"),
    ],
)
def test_errors_of_the_data_name_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "test.jsonl", ROWS[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        read_segments(path, PromptTemplate("{source}").render)


def test_a_limit_and_an_empty_file(data: Path, tmp_path: Path) -> None:
    template = PromptTemplate("{source}").render
    segments = read_segments(data, template, limit=1)
    assert len(segments) == 1
    assert groups(segments, by_category=True) == {"all": [0], "seen": [0]}
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        read_segments(tmp_path / "empty.jsonl", template)
