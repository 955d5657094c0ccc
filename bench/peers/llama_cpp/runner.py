"""llama.cpp's own ``llama-batched-bench``, all in float32; speaks ``peer.serve``'s lines.

It loads the model anew for each run and measures without that. Its prompts are random tokens and it
chooses no token (no argmax over the vocabulary), so its figures flatter it a little.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

from peer import serve

PROMPT_TOKENS = 17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="unused: the GGUF is the model")
    parser.add_argument("--bench", type=Path, required=True, help="llama-batched-bench")
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    for file in (arguments.bench, arguments.gguf):
        if not file.exists():
            parser.error(f"{file} is missing")

    def run(requests: int, new_tokens: int, tasks: int) -> float:
        assert tasks == 0, "base model only"
        # The prompt's pass gives the first new token, so one decoding step fewer is the same work.
        steps = new_tokens - 1
        options = {
            "-m": arguments.gguf,
            "-c": requests * (PROMPT_TOKENS + steps),
            "-b": 2048,
            "-ub": 512,
            "-npp": PROMPT_TOKENS,
            "-ntg": steps,
            "-npl": requests,
            "-t": arguments.threads,
            "-tb": arguments.threads,
            "-ctk": "f32",
            "-ctv": "f32",
            "--output-format": "jsonl",
        }
        command = [str(arguments.bench), *(str(x) for pair in options.items() for x in pair)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
        return float(json.loads(line)["t"])

    serve(run, {"llama-cpp-python": "0.3.36", "prompt_tokens": PROMPT_TOKENS})


if __name__ == "__main__":
    main()
