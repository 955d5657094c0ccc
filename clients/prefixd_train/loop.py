"""The loop: the LM frozen, a prefix trained, on one device or several, from any step on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import get_scheduler

from prefixd_train.batching import Batch, Collator, epoch_batches, epoch_steps, share
from prefixd_train.checkpoint import Checkpoints, random_state, set_random_state
from prefixd_train.data import Examples
from prefixd_train.errors import TrainError
from prefixd_train.lm import FrozenLM
from prefixd_train.objective import Objective, negative_log_likelihood, token_hits
from prefixd_train.options import TrainOptions
from prefixd_train.parameterise import PrefixParameters
from prefixd_train.progress import Reporter

__all__ = ["Trainer", "Validation"]


@dataclass
class Validation:
    """What the validations so far have found; losses are nats a token. The best is the one of the
    lowest loss, or of the highest accuracy where they are given one (the loss decides a tie)."""

    best_loss: float | None = None
    best_step: int | None = None
    without_better: int = 0
    best_accuracy: float | None = None
    """share of the target tokens, 0 to 1"""

    def add(self, loss: float, step: int, accuracy: float | None = None) -> bool:
        """Whether it is the best so far; what is not finite never is."""
        score = (-(accuracy or 0), loss)
        if all(map(isfinite, score)) and (
            self.best_loss is None or score < (-(self.best_accuracy or 0), self.best_loss)
        ):
            self.best_loss, self.best_step, self.without_better = loss, step, 0
            self.best_accuracy = accuracy
            return True
        self.without_better += 1
        return False


class Trainer:
    """Trains ``prefix`` in place, one call of :meth:`run`.

    An optimiser step takes ``grad_accum`` batches of ``batch_size`` examples, each shared among the
    processes, and its loss is the mean over all their tokens: neither the number of processes nor
    where batches are cut changes what a token counts. Which examples a step takes follows from its
    number, the seed and how many it takes. With ``dev``, the best prefix there is kept.
    """

    def __init__(
        self,
        lm: FrozenLM,
        prefix: PrefixParameters,
        train: Examples,
        options: TrainOptions,
        *,
        dev: Examples | None = None,
        objective: Objective = negative_log_likelihood,
        accelerator: Accelerator | None = None,
        checkpoints: Checkpoints | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self.lm, self.prefix, self.options = lm, prefix, options
        self.train, self.dev, self.objective = train, dev, objective
        self.accelerator = accelerator or Accelerator(cpu=lm.device.type == "cpu")
        self.checkpoints, self.reporter = checkpoints, reporter or Reporter()
        self.step = 0
        self.validation = Validation()
        self._best: dict[str, Tensor] | None = None
        self._collator = Collator.of(lm)
        self._epoch: tuple[int, list[list[list[int]]]] = (-1, [])
        self.steps_per_epoch = ceil(len(train) / (options.batch_size * options.grad_accum))
        self.num_steps = options.max_steps or options.epochs * self.steps_per_epoch
        self._weights = [weight for weight in prefix.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(
            self._weights, lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self._schedule = get_scheduler(
            # transformers' "constant" leaves the warm-up out.
            "constant_with_warmup" if options.schedule == "constant" else options.schedule,
            optimizer,
            num_warmup_steps=round(options.warmup * self.num_steps),
            num_training_steps=self.num_steps,
        )
        self._optimizer = self.accelerator.prepare_optimizer(optimizer)

    # --- running ---------------------------------------------------------------------------------
    def run(self) -> Validation:
        """Train to the last step or until patience is over; the prefix then is the best one.

        Raises TrainError where the loss is no number any more, and where the LM has changed.
        """
        before = self.lm.checksum()
        with self.reporter.running(self.num_steps, self.step):
            while self.step < self.num_steps and not self._out_of_patience:
                self._train_step()
                if self.dev is not None and self._due(self._eval_every):
                    self._validate(self.dev)
                if self._due(self.options.save_every):
                    self.save()
        if self.lm.checksum() != before:
            raise TrainError(
                f"the weights of {self.lm.name} have changed during the run: what was trained is of"
                " no use to the model as it was. Does the objective write to them?"
            )
        self.save()
        if self._best is not None:
            self.prefix.load_state_dict(self._best)
        return self.validation

    @property
    def _out_of_patience(self) -> bool:
        patience = self.options.patience
        return patience is not None and self.validation.without_better >= patience

    @property
    def _eval_every(self) -> int:
        return self.options.eval_every or self.steps_per_epoch

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.num_steps

    # --- one step --------------------------------------------------------------------------------
    def _train_step(self) -> None:
        started = time.perf_counter()
        self.prefix.train()
        loss, tokens = self._backward(self._batches_of(self.step))
        if not isfinite(loss):
            raise TrainError(
                f"the loss is {loss} at step {self.step + 1}: try a lower lr than"
                f" {self.options.learning_rate:g}"
            )
        norm = self._apply_gradients(tokens)
        self.step += 1
        self.reporter.stepped(
            self.step,
            epoch=round(self.step / self.steps_per_epoch, 4),
            loss=loss,
            lr=self._optimizer.param_groups[0]["lr"],
            grad_norm=norm,
            tokens=tokens,
            seconds=time.perf_counter() - started,
        )
        if not self._optimizer.step_was_skipped:
            self._schedule.step()
        self._optimizer.zero_grad()

    def _batches_of(self, step: int) -> list[list[int]]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            asked = self.options
            steps = epoch_steps(
                self.train.lengths, asked.batch_size, asked.grad_accum, seed=asked.seed, epoch=epoch
            )
            self._epoch = epoch, steps
        return self._epoch[1][place]

    def _backward(self, batches: Sequence[list[int]]) -> tuple[float, int]:
        """Leaves gradients of the summed loss; the mean loss and the tokens of all processes."""
        totals = torch.zeros(2, dtype=torch.float64)
        for batch in self._shares(self.train, batches):
            with self.accelerator.autocast():
                loss, tokens = self.objective(self.lm, batch, self.prefix())
            self.accelerator.backward(loss)
            totals += torch.tensor([loss.item(), tokens], dtype=torch.float64)
        return self._mean(totals)

    def _shares(self, examples: Examples, batches: Sequence[list[int]]) -> Sequence[Batch]:
        """This process's part of each batch; a short batch may have nothing for it."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        parts = [share(batch, rank, processes) for batch in batches]
        return [self._collate(examples, part) for part in parts if part]

    def _collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        batch = self._collator([examples[index] for index in indices])
        lines = [examples.lines[index] for index in indices]
        return replace(batch, lines=lines).to(self.lm.device)

    def _mean(self, totals: Tensor) -> tuple[float, int]:
        loss, tokens = self._sum(totals.to(self.lm.device)).tolist()
        return loss / tokens, int(tokens)

    def _sum(self, tensor: Tensor) -> Tensor:
        """Over all processes."""
        summed: Tensor = self.accelerator.reduce(tensor, "sum")
        return summed

    def _apply_gradients(self, tokens: int) -> float:
        """Their norm before clipping. What is not finite under fp16 skips the optimiser's step."""
        for weight in self._weights:
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            # Summed before they are unscaled: all processes find the same overflow.
            weight.grad = self._sum(grad)
        self.accelerator.unscale_gradients(self._optimizer)
        for weight in self._weights:
            assert weight.grad is not None
            weight.grad /= tokens
        norm = torch.nn.utils.clip_grad_norm_(self._weights, self.options.max_grad_norm)
        self._optimizer.step()
        return float(norm)

    # --- validation ------------------------------------------------------------------------------
    def _validate(self, dev: Examples) -> None:
        loss = self.evaluate(dev)
        accuracy = None
        if self.options.eval_metric == "token-accuracy":
            accuracy = self.evaluate(dev, token_hits)
        best = self.validation.add(loss, self.step, accuracy)
        if best:
            self._best = {
                name: value.detach().clone() for name, value in self.prefix.state_dict().items()
            }
        self.reporter.validated(self.step, dev_loss=loss, dev_accuracy=accuracy, best=best)

    @torch.no_grad()
    def evaluate(self, examples: Examples, measure: Objective | None = None) -> float:
        """The mean a token of a measure, of the objective unless it is given, without dropout."""
        measure = measure or self.objective
        self.prefix.eval()
        prefix = self.prefix()
        totals = torch.zeros(2, dtype=torch.float64)
        batches = epoch_batches(examples.lengths, self.options.batch_size, seed=0, epoch=0)
        for indices in batches:
            for batch in self._shares(examples, [indices]):
                with self.accelerator.autocast():
                    total, tokens = measure(self.lm, batch, prefix)
                totals += torch.tensor([total.item(), tokens], dtype=torch.float64)
        return self._mean(totals)[0]

    # --- checkpoints -----------------------------------------------------------------------------
    def save(self) -> None:
        """Write a checkpoint, if the trainer was given a place for them. All processes call it."""
        if self.checkpoints is None:
            return
        main = self.accelerator.is_main_process
        partial = self.checkpoints.partial(self.step)
        if main:
            self.checkpoints.begin(partial)
        self.accelerator.wait_for_everyone()
        torch.save(random_state(), partial / f"random-{self.accelerator.process_index}.pt")
        if main:
            torch.save(self._state(), partial / "state.pt")
        self.accelerator.wait_for_everyone()
        if main:
            self.checkpoints.publish(partial)
        self.accelerator.wait_for_everyone()

    def load(self, checkpoint: Path) -> None:
        """Go on from there; on a CPU and as many processes, as if there had been no break."""
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        self.step = state["step"]
        self.validation = Validation(**state["validation"])
        self._best = state["best"]
        self.prefix.load_state_dict(state["prefix"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        own = checkpoint / f"random-{self.accelerator.process_index}.pt"
        if own.exists():  # more processes than there were: the new ones draw anew
            set_random_state(torch.load(own, weights_only=True))

    def _state(self) -> Mapping[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "validation": asdict(self.validation),
            "best": self._best,
            "prefix": self.prefix.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
