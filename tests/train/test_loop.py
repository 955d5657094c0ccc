"""The loop trains the prefix and nothing else, on the loss it says, however a step is cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixd_store import read_manifest
from prefixd_train.batching import Batch, Collator, epoch_steps
from prefixd_train.data import Encoder, Example, Examples
from prefixd_train.errors import TrainError
from prefixd_train.inject import forward
from prefixd_train.lm import FrozenLM, load_lm
from prefixd_train.loop import Trainer, Validation
from prefixd_train.objective import negative_log_likelihood
from prefixd_train.options import TrainOptions
from prefixd_train.recompute import recompute_layers
from prefixd_train.run_folder import RunFolder
from prefixd_train.start import prefix_lengths, start_prefix
from prefixd_train.template import PromptTemplate
from prefixd_train.train import train
from tests.support.training import tiny_lm_folder
from tests.train.conftest import FOODS, Options


def examples_of(lm: FrozenLM, foods: Sequence[str] = FOODS) -> Examples:
    encoder = Encoder(lm.tokenizer, PromptTemplate("{source}\n"), lm.is_encoder_decoder)
    examples = Examples()
    for line, food in enumerate(foods):
        texts = encoder.texts({"source": f"food: {food}", "target": f"It serves {food} food."})
        for example in encoder.encode(texts):
            examples.add(example, line)
    return examples


def trainer_of(lm: FrozenLM, options: TrainOptions, **more: Any) -> Trainer:
    torch.manual_seed(0)
    examples = examples_of(lm)
    prefix = start_prefix(options, lm, prefix_lengths(options, lm), examples)
    return Trainer(lm, prefix, examples, options, **more)


@pytest.mark.parametrize(
    ("family", "parameterisation"),
    [("llama", "direct"), ("llama", "mlp"), ("t5", "direct"), ("bart", "mlp")],
)
def test_a_toy_task_is_learnt_and_the_lm_left_alone(
    family: str, parameterisation: str, tmp_path: Path, options: Options
) -> None:
    lm = load_lm(str(tiny_lm_folder(family, tmp_path / "lm")))
    settings = options(
        parameterisation=parameterisation,
        num_virtual_tokens=16,
        batch_size=8,
        max_steps=40,
        lr=0.3 if parameterisation == "direct" else 0.02,
        middle=32,
        hidden=32,
    )
    trainer = trainer_of(lm, settings)
    checksum, before = lm.checksum(), trainer.evaluate(trainer.train)
    trainer.run()
    assert trainer.evaluate(trainer.train) < 0.75 * before
    assert lm.checksum() == checksum
    assert all(weight.grad is None for weight in lm.module.parameters())


def test_the_loss_is_that_of_the_targets_alone(llama: FrozenLM, options: Options) -> None:
    """Against log-probabilities of one row at a time, without padding."""
    trainer = trainer_of(llama, options())
    examples, total, count = trainer.train, 0.0, 0
    with torch.no_grad():
        for source, target in (examples[i] for i in range(len(examples))):
            batch = Collator(0)([Example(source, target)])
            rows = forward(llama, batch, trainer.prefix())[0].log_softmax(-1)
            for place, token in enumerate(target, len(source) - 1):
                total, count = total - float(rows[place, token]), count + 1
    assert count == examples.num_targets
    assert trainer.evaluate(examples) == pytest.approx(total / count, abs=1e-5)


def test_gradients_do_not_depend_on_how_a_step_is_cut(llama: FrozenLM, options: Options) -> None:
    """Per token over the whole step: short examples weigh by their tokens in every cut."""
    foods = [*FOODS[:7], "food of so many kinds that nobody can count them all"]
    found = []
    for size, count in ((8, 1), (2, 4), (3, 3)):
        settings = options(batch_size=size, grad_accum=count, max_steps=1, max_grad_norm=1e9)
        trainer = trainer_of(llama, settings)
        trainer.train = examples_of(llama, foods)
        loss, tokens = trainer._backward(trainer._batches_of(0))
        trainer._apply_gradients(tokens)
        (weight,) = trainer.prefix.parameters()
        found.append((loss, tokens, weight.grad))
    for loss, tokens, grad in found[1:]:
        assert (tokens, loss) == (found[0][1], pytest.approx(found[0][0], rel=1e-6))
        torch.testing.assert_close(grad, found[0][2], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_recomputed_layers_give_the_same_gradients(
    family: str, tmp_path: Path, options: Options
) -> None:
    found = []
    for recompute in (False, True):
        lm = load_lm(str(tiny_lm_folder(family, tmp_path / f"lm{recompute}")))
        if recompute:
            recompute_layers(lm)
        trainer = trainer_of(lm, options())
        trainer._backward(trainer._batches_of(0))
        found.append([weight.grad for weight in trainer.prefix.parameters()])
    torch.testing.assert_close(found[1], found[0])


def test_steps_take_each_example_once_an_epoch(llama: FrozenLM, options: Options) -> None:
    trainer = trainer_of(llama, options(max_steps=None, epochs=2, batch_size=3, grad_accum=2))
    assert (trainer.steps_per_epoch, trainer.num_steps) == (2, 4)
    for epoch in (0, 1):
        steps = [trainer._batches_of(2 * epoch), trainer._batches_of(2 * epoch + 1)]
        assert steps == epoch_steps(trainer.train.lengths, 3, 2, seed=0, epoch=epoch)


def test_a_prefix_does_not_depend_on_how_its_steps_are_cut(
    llama: FrozenLM, options: Options
) -> None:
    """Several steps of fewer examples than there are, so that it matters which a step takes."""
    found = []
    for size, count in ((4, 1), (2, 2), (1, 4)):
        settings = options(batch_size=size, grad_accum=count, max_steps=None, epochs=3)
        trainer = trainer_of(llama, settings)
        trainer.run()
        assert trainer.step == 6
        found.append(trainer.prefix()["decoder"])
    for cut in found[1:]:
        torch.testing.assert_close(cut, found[0], rtol=0, atol=1e-4)


def test_the_best_prefix_is_kept_and_patience_ends(llama: FrozenLM, options: Options) -> None:
    losses = iter([5.0, 4.0, 4.5, 3.0, 3.1, 3.2, 3.0])
    prefixes = []

    def scripted(lm: FrozenLM, batch: Batch, prefix: Any) -> tuple[torch.Tensor, int]:
        if torch.is_grad_enabled():
            return negative_log_likelihood(lm, batch, prefix)
        prefixes.append(prefix["decoder"][0].clone())
        return torch.tensor(next(losses)), 1

    settings = options(max_steps=40, eval_every=2, patience=3, dev_fraction=0.5)
    dev = examples_of(llama, FOODS[:1])
    trainer = trainer_of(llama, settings, dev=dev, objective=scripted)
    validation = trainer.run()
    assert validation == Validation(best_loss=3.0, best_step=8, without_better=3)
    assert trainer.step == 14
    assert torch.equal(trainer.prefix()["decoder"][0], prefixes[3])
    assert not torch.equal(prefixes[3], prefixes[4])


def test_validation_counts() -> None:
    validation = Validation()
    losses = [3.0, 2.0, 2.0, float("nan"), 1.0, 4.0]
    assert [validation.add(loss, i) for i, loss in enumerate(losses)] == [1, 1, 0, 0, 1, 0]
    assert validation == Validation(best_loss=1.0, best_step=4, without_better=1)
    validation = Validation()
    scores = [(3.0, 0.0), (2.0, 0.5), (1.0, 0.4), (2.5, 0.5), (1.9, 0.5), (9.0, 0.6)]
    found = [validation.add(loss, i, accuracy) for i, (loss, accuracy) in enumerate(scores)]
    assert found == [1, 1, 0, 0, 1, 1]
    assert validation == Validation(9.0, 5, 0, best_accuracy=0.6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("accuracy", [None, 0.5])
def test_a_loss_that_is_no_number_is_never_the_best(bad: float, accuracy: float | None) -> None:
    validation = Validation()
    assert not validation.add(bad, 1, accuracy)
    assert validation == Validation(without_better=1)
    assert validation.add(7.0, 2, accuracy)
    assert not validation.add(bad, 3, accuracy and 0.9)
    assert validation == Validation(7.0, 2, 1, best_accuracy=accuracy)


def test_the_most_accurate_prefix_is_kept(llama: FrozenLM, options: Options) -> None:
    """Tokens are counted one row at a time; the loss, which would choose otherwise, breaks ties."""
    losses = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    found = []

    def scripted(lm: FrozenLM, batch: Batch, prefix: Any) -> tuple[torch.Tensor, int]:
        if torch.is_grad_enabled():
            return negative_log_likelihood(lm, batch, prefix)
        found.append({site: (k.clone(), v.clone()) for site, (k, v) in prefix.items()})
        return torch.tensor(next(losses)), 1

    settings = options(
        num_virtual_tokens=16,
        max_steps=30,
        lr=0.3,
        eval_every=5,
        eval_metric="token-accuracy",
        dev_fraction=0.5,
    )
    dev = examples_of(llama, FOODS[:3])
    trainer = trainer_of(llama, settings, dev=dev, objective=scripted)
    validation = trainer.run()
    accuracies = []
    with torch.no_grad():
        for prefix in found:
            hits = 0
            for source, target in (dev[i] for i in range(len(dev))):
                rows = forward(llama, Collator(0)([Example(source, target)]), prefix)[0]
                said = rows[len(source) - 1 : -1].argmax(-1).tolist()
                hits += sum(a == b for a, b in zip(said, target, strict=True))
            accuracies.append(hits / dev.num_targets)
    best = accuracies.index(max(accuracies))
    assert best > 0
    assert validation.best_accuracy == pytest.approx(accuracies[best])
    assert (validation.best_step, validation.best_loss) == (5 * best + 5, best + 1)
    assert torch.equal(trainer.prefix()["decoder"][0], found[best]["decoder"][0])


def test_an_objective_of_ones_own(llama: FrozenLM, options: Options) -> None:
    seen: list[int] = []

    def doubled(lm: FrozenLM, batch: Batch, prefix: Any) -> tuple[torch.Tensor, int]:
        seen.append(batch.num_targets)
        total, count = negative_log_likelihood(lm, batch, prefix)
        return 2 * total, count

    plain, twice = trainer_of(llama, options()), trainer_of(llama, options(), objective=doubled)
    assert twice.evaluate(twice.train) == pytest.approx(2 * plain.evaluate(plain.train))
    assert sum(seen) == twice.train.num_targets


def test_a_loss_that_is_no_number_ends_the_run(llama: FrozenLM, options: Options) -> None:
    def infinite(lm: FrozenLM, batch: Batch, prefix: Any) -> tuple[torch.Tensor, int]:
        total, count = negative_log_likelihood(lm, batch, prefix)
        return total * float("inf"), count

    with pytest.raises(TrainError, match=r"the loss is inf at step 1: try a lower lr than 0\.01"):
        trainer_of(llama, options(), objective=infinite).run()


def test_an_lm_that_has_changed_ends_the_run(llama_folder: Path, options: Options) -> None:
    """One bit of one weight is enough, and neither prefix nor last checkpoint is written."""
    lm = load_lm(str(llama_folder))

    def writing(lm: FrozenLM, batch: Batch, prefix: Any) -> tuple[torch.Tensor, int]:
        weight = lm.module.get_input_embeddings().weight
        weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(9.0))
        return negative_log_likelihood(lm, batch, prefix)

    trainer = trainer_of(lm, options(max_steps=1), objective=writing)
    with pytest.raises(TrainError, match=r"weights of \S+ have changed during the run"):
        trainer.run()


def test_the_file_says_how_it_came_to_be(options: Options, tmp_path: Path) -> None:
    settings = options(
        dev_fraction=0.25,
        patience=9,
        prompt_template="{source} =>",
        eval_metric="token-accuracy",
    )
    trained = train(settings)
    assert trained is not None
    told = read_manifest(trained.prefix).provenance
    assert told["training"]["prompt_template"] == "{source} =>"
    assert told["data"]["train"]["file"] == "train.jsonl"
    assert told["dev_loss"] == trained.validation.best_loss
    assert told["dev_accuracy"] == trained.validation.best_accuracy
    logged = [line for line in RunFolder(tmp_path / "run").read_metrics() if "dev_loss" in line]
    assert told["dev_accuracy"] == max(line["dev_accuracy"] for line in logged)
    assert told["card"] == (tmp_path / "run" / "README.md").read_text()
    assert str(tmp_path) not in str(told)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".lock",
        "README.md",
        "checkpoints",
        "config.json",
        "loss.png",
        "metrics.jsonl",
        "prefix.safetensors",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": "encoder"}, "sites 'encoder': .* has decoder, all"),
        ({"num_virtual_tokens": 4095}, "4095 virtual tokens leave no room: .* 4096 positions"),
        ({"sites": "decoder=4095"}, "4095 virtual tokens leave no room"),
        ({"frozen_first": 4}, "frozen_first is 4 of 4"),
        ({"init_text": "too short"}, "the text has 2 tokens; the prefix takes 4"),
        ({"max_length": 5}, "room for 5"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    options: Options, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainError, match=message):
        train(options(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 2}, "patience needs dev"),
        ({"eval_metric": "token-accuracy"}, "token-accuracy needs dev or dev_fraction"),
        ({"dev": "a", "dev_fraction": 0.5}, "exclude each other"),
        ({"init": "words"}, "init words needs init_text"),
        ({"init": "random", "init_text": "x"}, "of no use to init random"),
        ({"init": "prefix", "init_from": "a", "init_file": "b"}, "of no use to init prefix"),
        ({"init_text": "x", "init_file": "y"}, "init_text and init_file exclude each other"),
        ({"init_choose": "even"}, "init_choose even needs init_text, init_file or a document"),
        ({"init": "words", "init_text": "x", "init_choose": "even"}, "no use to init words"),
        ({"init": "prefix"}, "go together"),
        ({"prompt_template": "{a.b}"}, "not a plain name"),
        ({"dtype": "float16"}, "needs mixed_precision fp16"),
        ({"sites": "encoder=0,cross"}, "length of encoder is '0'; it must be 1 to 65536"),
        ({"sites": "cross=x"}, "length of cross is 'x'"),
        ({"sites": "cross,cross=3"}, "cross is named twice"),
        ({"task": "A b"}, "String should match pattern"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    options: Options, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        options(**settings)
