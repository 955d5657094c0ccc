"""What one would use without prefixd, on the same model and the same prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["Job", "Peers"]


class Job(NamedTuple):
    task: str | None
    prompt: str


class Peers:
    """transformers' generate on the base model, and PEFT's with the same prefixes."""

    def __init__(self, folder: Path, adapters: dict[str, Path]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.peft: Any = None
        for name, path in adapters.items():
            if self.peft is None:
                base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                self.peft = PeftModel.from_pretrained(base, path, adapter_name=name).eval()
            else:
                self.peft.load_adapter(path, adapter_name=name)

    def run_static_batch(self, prompts: Sequence[str], new_tokens: int) -> int:
        return self._generate(self.base, prompts, new_tokens)

    def run_one_after_another(self, work: Sequence[Job], new_tokens: int) -> int:
        tokens = 0
        for job in work:
            self.peft.set_adapter(job.task)
            tokens += self._generate(self.peft, [job.prompt], new_tokens)
        return tokens

    @torch.inference_mode()
    def _generate(self, model: Any, prompts: Sequence[str], new_tokens: int) -> int:
        batch = self.tokenizer(list(prompts), return_tensors="pt", padding=True)
        model.generate(
            **batch,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return len(prompts) * new_tokens
