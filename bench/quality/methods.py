"""What all methods share, and those that need no library of adapters."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import closing
from functools import cached_property
from typing import Any

import torch
from jobs import Job
from serving import Engine, engine_of_module
from texts import Texts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from prefixd_train.batching import IGNORED, Batch
from prefixd_train.frozen_linear import speed_up_frozen
from prefixd_train.initialise import activations_of_tokens
from prefixd_train.lm import FrozenLM, load_lm
from prefixd_train.objective import target_nll
from prefixd_train.sites import PrefixKV

__all__ = ["Base", "Changed", "FineTuning", "InContext", "Method", "TopLayers", "ZeroShot"]


class Base:
    """The frozen LM that all jobs of a run share."""

    def __init__(self, model: str, device: str) -> None:
        self.lm: FrozenLM = load_lm(model, device=device)
        self.tokenizer = self.lm.tokenizer

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @cached_property
    def module(self) -> Any:
        """transformers' model as everybody runs it. Not to be changed: see :meth:`own_module`."""
        module = AutoModelForCausalLM.from_pretrained(
            self.lm.folder, dtype=self.lm.dtype, attn_implementation="sdpa"
        )
        # One copy of the weights is enough.
        module.load_state_dict(self.lm.module.state_dict(), assign=True)
        module.tie_weights()
        module = module.to(self.device).eval().requires_grad_(False)
        speed_up_frozen(module)
        return module

    def own_module(self, *, own_weights: bool) -> Any:
        """A copy whose layers a method may change, and with ``own_weights`` its weights."""
        shared = {} if own_weights else {id(weight): weight for weight in self.module.parameters()}
        return copy.deepcopy(self.module, shared)

    @cached_property
    def engine(self) -> Engine:
        """Serves the LM as it is."""
        return Engine(self.lm.folder, str(self.device))

    def close(self) -> None:
        if "engine" in self.__dict__:
            self.engine.close()


class Method(ABC):
    """A way to make the LM do a task. Random values come from torch's generator."""

    def __init__(self, base: Base, job: Job, texts: Texts) -> None:
        self.base, self.job, self.texts = base, job, texts
        self.module = base.module
        """what gives the loss"""

    @property
    def device(self) -> torch.device:
        return self.base.device

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]: ...

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Summed over target tokens, and their number."""
        return module_nll(self.module, batch)

    def kv(self) -> PrefixKV | None:
        """The prefix that it decodes with."""
        return None

    def bytes_per_task(self) -> int:
        """What must be kept for the task beside the LM, in float32."""
        return 4 * sum(parameter.numel() for parameter in self.parameters())

    def prompt(self, text: str) -> list[int]:
        return list(self.base.tokenizer(text).input_ids)

    def generate(self, prompts: Sequence[str]) -> list[str]:
        """The first line of what is generated, for every method: all targets are one line."""
        tokens = [self.prompt(prompt) for prompt in prompts]
        made = [self.base.tokenizer.decode(ids) for ids in self.decode(tokens)]
        return [text.strip().partition("\n")[0].strip() for text in made]

    def decode(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Greedily, and at least the first line."""
        engine, kv = self.base.engine, self.kv()
        task = engine.register(self.base.lm, kv) if kv is not None else None
        lines = engine.lines(prompts, task, max_new_tokens=self.job.max_new_tokens)
        if task is not None:
            engine.forget(task)
        return lines


def module_nll(module: Any, batch: Batch) -> tuple[Tensor, int]:
    """The loss of any transformers or PEFT model, with the output layer on target tokens only."""
    examples, columns = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)

    def choose(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden = inputs[0]
        # Prompt tuning puts its virtual tokens ahead of the row.
        ahead = hidden.shape[1] - batch.input_ids.shape[1]
        return (hidden[examples, ahead + columns][None],)

    handle = module.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        logits = module(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[0]
    finally:
        handle.remove()
    return target_nll(logits, batch.labels[:, 1:][examples, columns])


class ZeroShot(Method):
    """The LM is told what to do, by its chat template where it has one."""

    instruction = "Describe this data in one or two plain sentences, and write nothing else:"

    def parameters(self) -> list[nn.Parameter]:
        return []

    def prompt(self, text: str) -> list[int]:
        told = f"{self.instruction} {text.strip()}"
        if not self.base.tokenizer.chat_template:
            return super().prompt(f"{told}\n")
        chat = [{"role": "user", "content": told}]
        text = self.base.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False
        )
        return list(self.base.tokenizer(text, add_special_tokens=False).input_ids)


class InContext(Method):
    """Training examples in front of the input. They are the same for all inputs, so their keys and
    values are computed once: the same tokens, without reading the examples again each time."""

    def parameters(self) -> list[nn.Parameter]:
        return []

    def kv(self) -> PrefixKV:
        text = "".join(f"{prompt}{target}\n\n" for prompt, target in self.texts.shown)
        return activations_of_tokens(self.base.lm, self.prompt(text))

    def bytes_per_task(self) -> int:
        return 4 * sum(tensor.numel() for tensor in self.kv()["decoder"])


class Changed(Method):
    """The LM's own weights are changed, so an engine of its own decodes."""

    @abstractmethod
    def merged(self) -> Any:
        """Transformers' model with the changed weights."""

    def decode(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        device = str(self.device)
        with closing(engine_of_module(self.merged(), self.base.tokenizer, device)) as engine:
            return engine.lines(prompts, None, max_new_tokens=self.job.max_new_tokens)


class FineTuning(Changed):
    def __init__(self, base: Base, job: Job, texts: Texts) -> None:
        super().__init__(base, job, texts)
        self.module = base.own_module(own_weights=True)
        for part in self.trained():
            part.requires_grad_(True)

    def trained(self) -> list[nn.Module]:
        return [self.module]

    def merged(self) -> Any:
        return self.module

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


class TopLayers(FineTuning):
    """Only the last two transformer layers."""

    def trained(self) -> list[nn.Module]:
        return list(self.module.model.layers[-2:])
