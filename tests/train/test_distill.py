"""A distilled document answers as the document does, and a run of it is as any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from prefixd_server.config import ModelConfig
from prefixd_server.models.loader import load_model
from prefixd_store import validate_file
from prefixd_train import train as train_module
from prefixd_train.errors import DataError, TooLongError, TrainError
from prefixd_train.initialise import from_prefix_file
from prefixd_train.inject import target_logits
from prefixd_train.lm import FrozenLM
from prefixd_train.loop import Trainer
from prefixd_train.options import TrainOptions
from prefixd_train.run_folder import RunFolder
from prefixd_train.teacher import Teacher
from prefixd_train.top_k import TopK, top_k_divergence, top_k_of
from prefixd_train.train import train
from tests.support.engine import EngineRun, request
from tests.support.killed import die, run_until_killed
from tests.support.training import batch_of

DOCUMENT = "The Harbour Library opens at nine. A late book costs ten cents a day. Tea is free.\n"
QUESTIONS: list[dict[str, Any]] = [
    {"source": "When does it open?"},
    {"source": "What does a late book cost?"},
    {"source": "Is the tea free?", "target": " Yes."},
    {"source": "Where is it?", "targets": [" At the harbour.", " By the water."]},
]

Distil = Callable[..., TrainOptions]


@pytest.fixture
def distil(llama_folder: Path, tmp_path: Path) -> Distil:
    document, questions = tmp_path / "library.txt", tmp_path / "questions.jsonl"
    document.write_text(DOCUMENT)
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))

    def make(**settings: Any) -> TrainOptions:
        defaults: dict[str, Any] = {
            "model": str(llama_folder),
            "method": "distill",
            "document": document,
            "task": "library",
            "out": tmp_path / "run",
            "num_virtual_tokens": 8,
            "answer_tokens": 6,
            "max_steps": 30,
            "batch_size": 4,
            "lr": 0.1,
            "log_every": 1,
            "device": "cpu",
        }
        if "self_generate" not in settings:
            defaults["questions"] = questions
        return TrainOptions(**(defaults | settings))

    return make


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(folder).read_metrics() if "loss" in line]


# --- the objective -------------------------------------------------------------------------------


def brute_force(student: torch.Tensor, teacher: torch.Tensor, k: int) -> float:
    """One outcome at a time, probabilities and not their logarithms."""
    total = 0.0
    for q, p in zip(student.softmax(1).tolist(), teacher.softmax(1).tolist(), strict=True):
        top = sorted(range(len(p)), key=lambda token: -p[token])[:k]
        rest = [token for token in range(len(p)) if token not in top]
        outcomes = [([token]) for token in top] + [rest]
        for tokens in outcomes:
            theirs, ours = sum(p[t] for t in tokens), sum(q[t] for t in tokens)
            total += theirs * float(torch.log(torch.tensor(theirs / ours, dtype=torch.float64)))
    return total


@pytest.mark.parametrize("k", [1, 4, 10])
def test_the_divergence_is_that_of_the_top_and_the_rest(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    student, teacher = (
        3 * torch.randn(5, 11, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    student.requires_grad_()
    top = top_k_of(teacher, k)
    divergence = top_k_divergence(student, top)
    assert divergence.item() == pytest.approx(brute_force(student, teacher, k), rel=1e-9)
    assert torch.autograd.gradcheck(lambda logits: top_k_divergence(logits, top), (student,))
    assert top_k_divergence(teacher, top).item() == pytest.approx(0, abs=1e-12)
    whole = (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum().item()
    assert divergence.item() == pytest.approx(whole) if k == 10 else divergence.item() < whole


def test_a_rest_that_is_next_to_nothing_has_a_finite_loss() -> None:
    logits = torch.tensor([[40.0, 39.0, -60.0, -61.0]], requires_grad=True)
    loss = top_k_divergence(logits, TopK(torch.tensor([[0]]), torch.tensor([[-1e-6, -14.0]])))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    with pytest.raises(ValueError, match="top_k is 4; there are 4 tokens"):
        top_k_of(logits, 4)


# --- a run ---------------------------------------------------------------------------------------


def test_the_document_itself_as_the_prefix_diverges_by_nothing(
    distil: Distil, llama: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate_only(trainer: Trainer) -> None:
        raise StopIteration(trainer.evaluate(trainer.train))

    monkeypatch.setattr(Trainer, "run", evaluate_only)
    length = len(llama.tokenizer(DOCUMENT).input_ids)
    with pytest.raises(StopIteration) as stopped:
        train(distil(num_virtual_tokens=length))
    assert stopped.value.value == pytest.approx(0, abs=1e-5)


def test_what_is_distilled_is_served(distil: Distil, llama: FrozenLM, tmp_path: Path) -> None:
    trained = train(distil(max_steps=60, lr=0.3, batch_size=5))
    assert trained is not None
    kl = losses(tmp_path / "run")
    assert kl[-1] < kl[0] / 3
    manifest = validate_file(trained.prefix)
    assert manifest.provenance["data"]["document"]["file"] == "library.txt"
    assert manifest.query_offset == 8
    assert "| distilled from | library.txt, " in (tmp_path / "run" / "README.md").read_text()
    # The first virtual token is the document's own first.
    prefix = from_prefix_file(llama, trained.prefix)
    ids = llama.tokenizer(DOCUMENT).input_ids
    first = train_module.start_prefix(
        distil(), llama, {"decoder": 8}, Teacher(tmp_path / "run/teacher").examples, document=ids
    )()
    torch.testing.assert_close(prefix["decoder"][0][:, :, 0], first["decoder"][0][:, :, 0])
    assert not torch.allclose(prefix["decoder"][0][:, :, 1], first["decoder"][0][:, :, 1])

    examples = Teacher(tmp_path / "run" / "teacher").examples
    sources, targets = zip(*(examples[index] for index in range(len(examples))), strict=True)
    with torch.no_grad():
        logits, tokens, rows = target_logits(llama, batch_of(llama, sources, targets), prefix)
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    with EngineRun(load_model(ModelConfig(model=str(llama.folder))), tmp_path / "store") as run:
        version = manifest.version_record(trained.sha256, trained.prefix.stat().st_size)
        run.server.registry.publish("default", "library", trained.prefix, version)
        run.submit(
            request(f"{i}", "library", [*s, *t], prompt_logprobs=True, max_new_tokens=1)
            for i, (s, t) in enumerate(zip(sources, targets, strict=True))
        )
        run.run()
    for i, target in enumerate(targets):
        started = run.results[f"{i}"].started
        assert started is not None
        served = started.prompt_logprobs[-len(target) :]
        assert list(served) == pytest.approx(logprobs[rows == i].tolist(), abs=1e-4)


def test_answers_are_the_models_own_with_the_document_in_context(
    distil: Distil, llama: FrozenLM, tmp_path: Path
) -> None:
    """Against transformers' forward of document, prompt and answer as one text, no prefix at all;
    and a row a target, given or written."""
    train(distil(max_steps=1))
    teacher = Teacher(tmp_path / "run" / "teacher")
    assert len(teacher.examples) == 5
    document = llama.tokenizer(DOCUMENT).input_ids
    for index, (source, target) in enumerate(teacher.examples[i] for i in range(5)):
        batch = batch_of(llama, [[*document, *source]], [list(target)])
        with torch.no_grad():
            expected = target_logits(llama, batch, None).logits
        top = teacher.rows([index + 1], llama.device)
        assert torch.equal(top.ids, top_k_of(expected, 20).ids)
        torch.testing.assert_close(top.logprobs, top_k_of(expected, 20).logprobs, atol=1e-4, rtol=0)
        if index < 2:  # written, not given
            assert (
                target == expected.argmax(1).tolist() or list(target) == expected.argmax(1).tolist()
            )


def test_the_model_writes_the_same_questions_for_a_seed(distil: Distil, tmp_path: Path) -> None:
    written = []
    for place, seed in enumerate((0, 0, 1)):
        folder = tmp_path / f"run{place}"
        train(distil(self_generate=2, chunk_tokens=9, seed=seed, max_steps=1, out=folder))
        written.append((folder / "teacher" / "examples.jsonl").read_bytes())
    assert written[0] == written[1] != written[2]
    rows = [json.loads(line) for line in written[0].splitlines()]
    assert [row["prompt"].split()[:2] for row in rows[:2]] == [
        ["Question:", "What"],
        ["Question:", "Who"],
    ]
    assert all(row["prompt"].endswith("\nAnswer:") for row in rows)


def test_a_question_that_does_not_fit_is_named_or_left_out(
    distil: Distil, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The longest of those that the model writes."""
    train(distil(self_generate=4, max_steps=1, out=tmp_path / "all"))
    rows = Teacher(tmp_path / "all" / "teacher").examples
    sizes = [len(rows[index].source) for index in range(4)]
    longest, room = sizes.index(max(sizes)), sorted(set(sizes))[-2] + 6
    assert sizes.count(max(sizes)) == 1
    settings = {"self_generate": 4, "max_steps": 1, "max_length": room}
    with pytest.raises(
        TooLongError, match=rf"question {longest + 1} that the model wrote, '\w+ .*:"
    ):
        train(distil(out=tmp_path / "named", **settings))
    train(distil(too_long="skip", **settings), console=Console(stderr=True))
    assert len(Teacher(tmp_path / "run" / "teacher").examples) == 3
    said = "too long and left out: 1 of the questions that the model wrote"
    assert said in capsys.readouterr().err
    with pytest.raises(TooLongError, match="none of the 4 questions that the model wrote fits"):
        train(distil(too_long="skip", out=tmp_path / "none", **settings | {"max_length": 12}))


def test_a_killed_run_ends_with_the_same_bytes(
    distil: Distil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"max_steps": 8, "save_every": 3, "dev_fraction": 0.3}
    settings |= {"self_generate": 5, "answer_tokens": 4}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(distil(out=whole, **settings))

    def die_in(name: str, step: int, resume: bool) -> None:
        def run() -> None:
            original, calls = getattr(Teacher, name), iter(range(100))

            def wrapped(*args: Any) -> Any:
                return die() if next(calls) == step else original(*args)

            monkeypatch.setattr(Teacher, name, wrapped)
            train(distil(out=killed, resume=resume, **settings))

        run_until_killed(run)

    def die_while_teaching() -> None:
        monkeypatch.setattr("prefixd_train.teacher.publish_folder", lambda *_: die())
        train(distil(out=killed, **settings))

    run_until_killed(die_while_teaching)
    assert not (killed / "teacher").exists()
    die_in("divergence", 6, resume=True)
    assert (killed / "checkpoints" / "step-00000003").exists()
    train(distil(out=killed, resume=True, **settings))
    for name in ("prefix.safetensors", "README.md", "teacher/top_ids.npy"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert losses(killed) == losses(whole)


def test_a_run_belongs_to_its_teacher(distil: Distil, tmp_path: Path) -> None:
    train(distil(max_steps=1))
    with pytest.raises(TrainError, match=r"settings\.top_k was 20, is 5"):
        train(distil(max_steps=1, top_k=5, resume=True))
    with (tmp_path / "run" / "teacher" / "top_ids.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    with pytest.raises(TrainError, match=r"top_ids.npy has changed since the teacher wrote it"):
        train(distil(max_steps=1, resume=True))


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": "When?"}', "questions.jsonl:2: has no source, which the prompt template"),
        ('{"source": "When?", "target": 3}', "questions.jsonl:2: target must be a text"),
        ("{", "questions.jsonl:2: not JSON"),
        (
            json.dumps({"source": "a " * 5000}),
            r"questions.jsonl:2: source and answer of \d+ tokens",
        ),
    ],
)
def test_a_wrong_question_is_named_by_its_line(
    distil: Distil, tmp_path: Path, row: str, message: str
) -> None:
    (tmp_path / "questions.jsonl").write_text(f'{{"source": "When?"}}\n{row}\n')
    with pytest.raises(DataError, match=message):
        train(distil())
    assert not (tmp_path / "run").exists()


def test_a_document_longer_than_the_context_is_refused(distil: Distil, tmp_path: Path) -> None:
    (tmp_path / "library.txt").write_text("tea " * 5000)
    with pytest.raises(DataError, match=r"has 5002 tokens; .* does not fit \S+'s 4096 positions"):
        train(distil())
    (tmp_path / "library.txt").write_text("tea")
    with pytest.raises(TrainError, match="has 2 tokens, fewer than the 8 virtual tokens"):
        train(distil())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 49_152}, r"top_k is 49152; llama\S* has 49152 tokens, so it is at most 49151"),
        ({"self_generate": 1, "dev_fraction": 0.5}, "self_generate: one question; a dev split of"),
    ],
)
def test_what_does_not_fit_the_model_leaves_no_run(
    distil: Distil, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainError, match=message):
        train(distil(**settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"document": None}, "method distill needs a document"),
        ({"self_generate": 3, "questions": "q.jsonl"}, "one of questions and self_generate"),
        ({"questions": None}, "one of questions and self_generate"),
        ({"data": "train.jsonl"}, "data is of no use to method distill"),
        ({"method": "examples"}, "document needs method distill"),
    ],
)
def test_settings_that_do_not_go_together(
    distil: Distil, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        distil(**settings)
