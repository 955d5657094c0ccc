"""transformers and PEFT on the same model; speaks ``peer.serve``'s lines.

``generate``    the base model without any prefix, one padded batch
``continuous``  the base model, ``generate_batch``: transformers' own continuous batching
``peft``        prefix tuning: with one task all requests in one batch, with more one request after
                another, since PEFT cannot mix prefixes in a batch
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peer import TokenIds, serve, versions  # isort: skip

import torch
from prompts import prompts
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
)

PAGE = 128
"""tokens: the prompts and answers fit into one, so that nothing is wasted on long tables"""


class Runner:
    def __init__(self, folder: Path, mode: str, adapters: Sequence[Path]) -> None:
        self.mode = mode
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        # Without an end token every answer has its full length; `min_new_tokens` would give other
        # tokens, since it forbids the end token that the other servers are told to ignore.
        self.model.generation_config.eos_token_id = None
        self.adapters = adapters
        if mode == "peft":
            self.model = _with_adapters(self.model, adapters)

    # Not inference_mode: continuous batching updates its tensors on a thread of its own.
    @torch.no_grad()
    def run(self, requests: int, new_tokens: int, tasks: int) -> TokenIds:
        texts = prompts(requests)
        if self.mode == "continuous":
            return self._continuous(texts, new_tokens)
        if self.mode == "generate":
            return self._generate(texts, new_tokens)
        names = [path.name for path in self.adapters[:tasks]]
        if tasks == 1:
            self.model.set_adapter(names[0])
            return self._generate(texts, new_tokens)
        answers: list[Sequence[int]] = []
        for number, text in enumerate(texts):
            self.model.set_adapter(names[number % len(names)])
            answers += self._generate([text], new_tokens)
        return answers

    def _generate(self, texts: Sequence[str], new_tokens: int) -> TokenIds:
        batch = self.tokenizer(list(texts), return_tensors="pt", padding=True)
        output = self.model.generate(
            **batch,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        answers: TokenIds = output[:, batch["input_ids"].shape[1] :].tolist()
        return answers

    def _continuous(self, texts: Sequence[str], new_tokens: int) -> TokenIds:
        inputs = [self.tokenizer(text)["input_ids"] for text in texts]
        blocks = -(-(max(map(len, inputs)) + new_tokens) // PAGE)
        results = self.model.generate_batch(
            inputs,
            generation_config=GenerationConfig(
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=self.tokenizer.pad_token_id,
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=len(inputs) * blocks + 1,
                max_batch_tokens=512,
                allow_block_sharing=False,
            ),
        )
        return [result.generated_tokens for result in results.values()]


def _with_adapters(model: Any, adapters: Sequence[Path]) -> Any:
    from peft import PeftModel

    first, *others = adapters
    model = PeftModel.from_pretrained(model, first, adapter_name=first.name).eval()
    model.base_model.generation_config.eos_token_id = None
    for path in others:
        model.load_adapter(path, adapter_name=path.name)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mode", choices=("generate", "continuous", "peft"), required=True)
    parser.add_argument("--adapters", type=Path, nargs="*", default=[], help="PEFT folders")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runner = Runner(arguments.model, arguments.mode, arguments.adapters)
    serve(runner.run, versions("torch", "transformers", "peft"))


if __name__ == "__main__":
    main()
