"""The comparison of methods compares what it says: each decodes and trains as its library does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from prefixd_train.bootstrap import draw
from tests.support.models import tiny_model_folder
from tests.support.threads import one_thread

__all__ = ["one_thread"]

pytestmark = pytest.mark.usefixtures("one_thread")

QUALITY = Path(__file__).parents[2] / "bench" / "quality"
NAMES = [path.stem for path in QUALITY.glob("*.py")]
NEW_TOKENS = 4
EOS = 2


@pytest.fixture(scope="module")
def quality() -> Iterator[SimpleNamespace]:
    """The scripts' modules by name. Their names are plain, so no other test may see them."""
    before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    sys.path.insert(0, str(QUALITY))
    yield SimpleNamespace(**{name: import_module(name) for name in NAMES})
    sys.path.remove(str(QUALITY))
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "source": f"name[{'Blue Spice ' * (i % 3)}{i}]",
            "targets": [f"{i} is a pub.", f"Pub {i}."],
        }
        for i in range(60)
    ]
    for dataset in ("e2e", "webnlg"):
        (folder / dataset).mkdir()
        for name in ("train", "test"):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / dataset / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def base(quality: SimpleNamespace, model: Path) -> Iterator[Any]:
    with closing(quality.methods.Base(str(model), "cpu")) as base:
        yield base


TRAINED: dict[str, Any] = {}
"""by name: several tests look at one"""


def trained(quality: SimpleNamespace, base: Any, data: Path, method: str) -> Any:
    if method not in TRAINED:
        TRAINED[method] = _train(quality, base, data, method)
    return TRAINED[method]


def _train(quality: SimpleNamespace, base: Any, data: Path, method: str) -> Any:
    job = quality.jobs.Job(method, n=8, length=3, num_test=3, max_new_tokens=NEW_TOKENS)
    texts = quality.texts.load_texts(job, data, base.tokenizer)
    torch.manual_seed(0)
    found = quality.run.KINDS.get(method, quality.run.Prefix)(base, job, texts)
    if found.parameters():
        collate = quality.run.Collator.of(base.lm)
        quality.loop.train(found, texts.train, collate, steps=3, batch_size=2, lr=1e-2, seed=0)
    return found


PEERS = ["peft-prefix", "peft-prompt", "peft-lora", "peft-ia3", "peft-loha"]
PEERS += ["fine-tuning", "top-2-layers"]


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_decodes_and_scores_as_its_library_does(
    quality: SimpleNamespace, base: Any, data: Path, name: str
) -> None:
    method = trained(quality, base, data, name)
    module = getattr(method, "peft", method.module)
    prompts = [method.prompt(segment.prompt) for segment in method.texts.test]
    assert len({len(prompt) for prompt in prompts}) > 1
    assert method.decode(prompts) == [generated(module, prompt) for prompt in prompts]
    batch = quality.run.Collator.of(base.lm)(method.texts.train)
    logits = module(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logits = logits[:, -batch.input_ids.shape[1] :]  # behind a soft prompt's own
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    total, num_targets = method.loss(batch)
    assert (total / num_targets).item() == pytest.approx(expected.item(), rel=1e-5)


OURS = ["in-context", "prefix-mlp-words", "prefix-direct-text", "embedding-only"]


@pytest.mark.parametrize("name", OURS)
def test_ours_decode_as_transformers_does_behind_their_keys_and_values(
    quality: SimpleNamespace, base: Any, data: Path, name: str
) -> None:
    method = trained(quality, base, data, name)
    prompts = [method.prompt(segment.prompt) for segment in method.texts.test]
    keys, values = method.kv()["decoder"]
    expected = []
    for prompt in prompts:
        cache = DynamicCache()
        for layer in range(len(keys)):
            cache.update(keys[layer][None], values[layer][None], layer)
        expected.append(generated(base.module, prompt, cache))
    assert method.decode(prompts) == expected


def test_an_infix_decodes_in_a_batch_as_alone(
    quality: SimpleNamespace, base: Any, data: Path
) -> None:
    method = trained(quality, base, data, "infix-mlp-words")
    prompts = [method.prompt(segment.prompt) for segment in method.texts.test]
    assert method.decode(prompts) == [method.decode([prompt])[0] for prompt in prompts]


def test_methods_leave_the_common_weights_alone(
    quality: SimpleNamespace, base: Any, data: Path, model: Path
) -> None:
    for name in PEERS:
        trained(quality, base, data, name)
    untouched = AutoModelForCausalLM.from_pretrained(model).state_dict()
    for name, weight in base.module.state_dict().items():
        assert torch.equal(weight, untouched[name]), name


def generated(module: Any, prompt: list[int], cache: DynamicCache | None = None) -> list[int]:
    """Greedy tokens up to the end of sequence or of the line, which is kept."""
    ahead = 0 if cache is None else cache.get_seq_length()
    # What stands for the cached tokens is not looked at.
    ids = torch.tensor([[0] * ahead + prompt])
    row = module.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=EOS,
    )[0].tolist()[ahead + len(prompt) :]
    return row[: row.index(EOS)] if EOS in row else row


def test_our_random_prefix_trains_as_pefts(quality: SimpleNamespace, base: Any, data: Path) -> None:
    ours = trained(quality, base, data, "prefix-direct-random").kv()["decoder"]
    theirs = trained(quality, base, data, "peft-prefix").kv()["decoder"]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_a_run_goes_on_where_it_was_stopped(
    quality: SimpleNamespace,
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*methods: str) -> str:
        only = [part for method in methods for part in ("--only", method)]
        places = ["--data", str(data), "--out", str(tmp_path), "--model", str(model)]
        monkeypatch.setattr(sys, "argv", ["run.py", "--size", "smoke", *places, *only])
        quality.run.main()
        return capsys.readouterr().err

    assert "1 jobs, 1 to do" in run("zero-shot")
    assert "3 jobs, 2 to do" in run("zero-shot", "prefix-mlp-words")
    assert "3 jobs, 0 to do" in run("zero-shot", "prefix-mlp-words")
    monkeypatch.setattr(sys, "argv", ["report.py", "--out", str(tmp_path)])
    quality.report.main()
    text = (tmp_path / "report.md").read_text()
    assert "| prefix-mlp-words, 4 virtual tokens | 1 |" in text
    assert (tmp_path / "quality-e2e-methods.svg").exists()


def test_two_processes_do_not_do_one_job(quality: SimpleNamespace, tmp_path: Path) -> None:
    job = quality.jobs.Job("zero-shot")
    with quality.run.claimed(tmp_path, job) as first:
        assert first == []
        with quality.run.claimed(tmp_path, job) as second:
            assert second is None
    with quality.run.claimed(tmp_path, job) as again:
        assert again == []
    (tmp_path / "results.jsonl").write_text(json.dumps({"key": job.key}) + "\n")
    with quality.run.claimed(tmp_path, job) as done:
        assert done is None


def test_a_difference_is_of_the_same_resampled_inputs(quality: SimpleNamespace) -> None:
    """As sacrebleu scores the texts of each resample."""
    references = [[f"the pub {word} is by the river {i}"] for i, word in enumerate("abcdefgh")]
    texts = {
        "good": [refs[0] for refs in references[:6]] + ["a pub", "another pub by a road it is"],
        "poor": [refs[0].replace("river", "road") for refs in references],
    }
    bleu = quality.bleu
    rows = {name: bleu.statistics(made, references) for name, made in texts.items()}
    streams = [[refs[0] for refs in references]]
    expected = {n: sacrebleu.corpus_bleu(made, streams).score for n, made in texts.items()}
    found = bleu.difference({0: rows["good"], 1: rows["good"]}, {0: rows["poor"]})
    assert found.value == pytest.approx(expected["good"] - expected["poor"])
    assert found.by_seed == pytest.approx([found.value])
    assert found.low < found.value < found.high
    same = bleu.difference({0: rows["good"]}, {0: rows["good"]})
    assert (same.value, same.low, same.high) == (0, 0, 0)
    chosen = draw(len(references), bleu.NUM_RESAMPLES, seed=0)
    values = []
    for drawn in chosen:
        scores = [
            sacrebleu.corpus_bleu([made[i] for i in drawn], [[streams[0][i] for i in drawn]]).score
            for made in texts.values()
        ]
        values.append(scores[0] - scores[1])
    assert np.quantile(values, [0.025, 0.975]) == pytest.approx([found.low, found.high])


def test_the_learning_rate_is_the_best_of_those_tried(quality: SimpleNamespace) -> None:
    jobs = quality.jobs
    tried = [
        {"job": {"method": "peft-lora", "num_test": test}, "lr": lr, "dev_loss": loss}
        for lr, loss, test in ((1e-3, 2.0, 0), (3e-3, 1.5, 0), (1e-2, 1.0, 100))
    ]
    assert jobs.chosen_lr(jobs.Job("peft-lora"), tried) == 3e-3
    assert jobs.chosen_lr(jobs.Job("peft-lora", lr=1e-4), tried) == 1e-4
    assert jobs.chosen_lr(jobs.Job("peft-ia3"), tried) == jobs.LEARNING_RATES["peft-ia3"][0]


def test_a_cartridge_is_measured_against_the_document(
    quality: SimpleNamespace,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The figures of a cut document are those of transformers that reads it as text."""
    document, questions, out = tmp_path / "a.txt", tmp_path / "q.jsonl", tmp_path / "out"
    document.write_text("The Harbour Library opens at nine. A late book costs ten cents a day.\n")
    questions.write_text('{"source": "When?"}\n{"source": "What does it cost?"}\n')
    size = quality.cartridge.Size((4,), 6, 2, None, 2, chunk_tokens=8, answer_tokens=3)
    monkeypatch.setitem(quality.cartridge.SIZES, "smoke", size)
    places = [f"--model={model}", f"--document={document}", f"--questions={questions}"]
    monkeypatch.setattr(sys, "argv", ["cartridge.py", *places, f"--out={out}", "--threads=1"])
    quality.cartridge.main()
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    contexts = {line["context"]: line for line in lines}
    assert list(contexts) == [
        "nothing",
        "first 4 tokens",
        "4 tokens of all",
        "cartridge of 4",
        "the document",
    ]
    assert contexts["cartridge of 4"]["train_questions"] == 4
    assert contexts["the document"]["held_out"]["written"]["kl"] == pytest.approx(0, abs=1e-6)
    assert capsys.readouterr().out == (out / "report.md").read_text()

    base = quality.methods.Base(str(model), "cpu")
    tokens = base.tokenizer(document.read_text()).input_ids
    rows = [json.loads(line) for line in (out / "written" / "examples.jsonl").open()]

    def logprobs(context: list[int], row: dict[str, Any]) -> torch.Tensor:
        ids = torch.tensor([[*context, *row["source"], *row["target"]]])
        return base.module(ids).logits[0, -len(row["target"]) - 1 : -1].log_softmax(-1)

    for name, context in (("nothing", []), ("first 4 tokens", tokens[:4])):
        pairs = [(logprobs(tokens, row), logprobs(context, row), row["target"]) for row in rows]
        whole, cut = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
        targets = torch.tensor([token for *_, target in pairs for token in target])
        found = contexts[name]["held_out"]["written"]
        kl = F.kl_div(cut, whole, reduction="sum", log_target=True) / len(targets)
        assert found["tokens"] == len(targets)
        assert found["kl"] == pytest.approx(kl.item(), rel=1e-3)
        assert found["kl_low"] <= found["kl"] <= found["kl_high"]
        assert found["perplexity"] == pytest.approx(F.nll_loss(cut, targets).exp().item(), rel=1e-4)
        same = (whole.argmax(1) == cut.argmax(1)).float().mean()
        assert found["same_token"] == pytest.approx(same.item())
