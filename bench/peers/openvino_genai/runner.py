"""OpenVINO GenAI's continuous batching on the base model; speaks ``peer.serve``'s lines.

Weights are float32. ``f32`` computes and caches in float32 as the others do; ``default`` leaves
both to the CPU plug-in (bfloat16 where the CPU has it, and a KV cache of 8 bits).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from peer import TokenIds, serve, versions  # isort: skip

import numpy as np
import openvino as ov
import openvino_genai as genai
from prompts import prompts

F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--export", type=Path, required=True, help="the model as OpenVINO IR")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("f32", "default"), default="f32")
    arguments = parser.parse_args()

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    # The prompts repeat from round to round: nothing may come from a cache.
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": arguments.threads}
    if arguments.precision == "f32":
        properties |= F32
    pipeline = genai.ContinuousBatchingPipeline(str(arguments.export), scheduler, "CPU", properties)
    tokenizer = pipeline.get_tokenizer()
    eos = json.loads((arguments.export / "config.json").read_text())["eos_token_id"]

    def run(requests: int, new_tokens: int, tasks: int) -> TokenIds:
        assert tasks == 0, "base model only"
        config = genai.GenerationConfig(
            max_new_tokens=new_tokens, ignore_eos=True, do_sample=False, eos_token_id=eos
        )
        inputs = [
            ov.Tensor(np.array(tokenizer.encode(p, add_special_tokens=True).input_ids.data))
            for p in prompts(requests)
        ]
        results = pipeline.generate(inputs, [config] * requests)
        return [result.m_generation_ids[0] for result in results]

    serve(run, versions("openvino", "openvino-genai") | {"precision": arguments.precision})


if __name__ == "__main__":
    main()
