"""The methods of PEFT. (Houlsby's adapters are in no library that installs beside this
transformers; IA3 and LoHa are PEFT's own small ones.)"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jobs import Job
from methods import Base, Changed, Method, module_nll
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    get_peft_model,
)
from prefixes import WORDS
from texts import Texts
from torch import Tensor, nn

from prefixd_train.batching import Batch
from prefixd_train.initialise import record_activations
from prefixd_train.sites import PrefixKV

__all__ = ["Adapter", "PeftPrefix", "PeftPrompt"]

TASK = "CAUSAL_LM"
PROMPT_FACTOR = 2
"""a soft prompt has so few parameters that it gets twice the virtual tokens"""

ADAPTERS = {
    # On queries and values, as many parameters as 10 virtual tokens of SmolLM2-135M have.
    "peft-lora": LoraConfig(task_type=TASK, r=2, lora_alpha=4),
    "peft-ia3": IA3Config(task_type=TASK),
    "peft-loha": LoHaConfig(task_type=TASK, r=2, alpha=4, target_modules=["q_proj", "v_proj"]),
}


class Adapter(Changed):
    """LoRA, IA3, LoHa: they change the LM's layers."""

    def __init__(self, base: Base, job: Job, texts: Texts) -> None:
        super().__init__(base, job, texts)
        self.module = get_peft_model(base.own_module(own_weights=False), ADAPTERS[job.method])

    def merged(self) -> Any:
        # A copy, since the weights are everybody's.
        return copy.deepcopy(self.module).merge_and_unload()

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


class _Virtual(Method):
    """PEFT's methods with virtual tokens. They decode from the keys and values that those have."""

    def __init__(self, base: Base, job: Job, texts: Texts) -> None:
        super().__init__(base, job, texts)
        self.peft = get_peft_model(base.own_module(own_weights=False), self.config())

    def config(self) -> Any:
        raise NotImplementedError

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.peft.parameters() if parameter.requires_grad]

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        return module_nll(self.peft, batch)


class PeftPrefix(_Virtual):
    def config(self) -> Any:
        return PrefixTuningConfig(task_type=TASK, num_virtual_tokens=self.job.length)

    @torch.no_grad()
    def kv(self) -> PrefixKV:
        layers = self.peft.get_prompt(batch_size=1).layers
        keys = torch.stack([layer.keys[0] for layer in layers])
        return {"decoder": (keys, torch.stack([layer.values[0] for layer in layers]))}


class PeftPrompt(_Virtual):
    def config(self) -> Any:
        return PromptTuningConfig(
            task_type=TASK,
            num_virtual_tokens=PROMPT_FACTOR * self.job.length,
            prompt_tuning_init=PromptTuningInit.TEXT,
            prompt_tuning_init_text=WORDS,
            tokenizer_name_or_path=str(self.base.lm.folder),
        )

    @torch.no_grad()
    def kv(self) -> PrefixKV:
        embeddings = self.peft.get_prompt(batch_size=1)
        positions = torch.arange(embeddings.shape[1], device=self.device)[None]
        return record_activations(self.base.lm, inputs_embeds=embeddings, position_ids=positions)
