"""The peers by name: what runs, in which environment, and which workloads it can do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from harness.processes import Peer

__all__ = ["PEERS", "Job", "PeerSpec", "set_up", "start"]

PEERS_FOLDER = Path(__file__).parents[1] / "peers"
ENVIRONMENTS = Path(__file__).parents[1] / ".envs"
_WHERE = {"envs": str(ENVIRONMENTS)}


class Job(NamedTuple):
    """One way to run a peer: what it is called in the tables, how many tasks share a run."""

    label: str
    tasks: int
    share: int = 1
    """run only one of so many requests: for what takes requests one after another, whose rate
    does not depend on how many follow"""


@dataclass(frozen=True)
class PeerSpec:
    folder: str
    """of bench/peers: ``runner.py`` and, where it needs its own environment, ``setup.sh``"""
    jobs: tuple[Job, ...]
    arguments: tuple[str, ...] = ()
    """``{envs}`` stands for the folder of the environments"""
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)
    adapters: int = 0
    """how many PEFT folders of the store's tasks it wants"""

    @property
    def setup(self) -> Path:
        return PEERS_FOLDER / self.folder / "setup.sh"


_BASE = Job("base model", 0)
_OPENVINO = str(ENVIRONMENTS / "openvino" / "bin" / "python")
_VLLM = str(ENVIRONMENTS / "vllm" / "bin" / "python")
_VLLM_ENV = {
    # vLLM asks for Intel's OpenMP and sizes torch's threads by this variable.
    "LD_PRELOAD": str(ENVIRONMENTS / "vllm" / "lib" / "libiomp5.so"),
}

PEERS = {
    "transformers": PeerSpec("hugging_face", (_BASE,), ("--mode=generate",)),
    "transformers-continuous": PeerSpec("hugging_face", (_BASE,), ("--mode=continuous",)),
    "peft": PeerSpec(
        "hugging_face",
        (Job("one task, one batch", 1), Job("32 tasks, one after another", 32, share=4)),
        ("--mode=peft",),
        adapters=32,
    ),
    "openvino": PeerSpec(
        "openvino_genai",
        (_BASE,),
        ("--export={envs}/openvino-model", "--precision=f32"),
        python=_OPENVINO,
    ),
    "openvino-default": PeerSpec(
        "openvino_genai",
        (_BASE,),
        ("--export={envs}/openvino-model", "--precision=default"),
        python=_OPENVINO,
    ),
    "vllm": PeerSpec(
        "vllm_cpu",
        (_BASE,),
        python=_VLLM,
        environment=_VLLM_ENV,
    ),
    "vllm-lora": PeerSpec(
        "vllm_cpu",
        (Job("32 LoRA adapters", 32),),
        ("--lora=32",),
        python=_VLLM,
        environment=_VLLM_ENV,
    ),
    "llama.cpp": PeerSpec(
        "llama_cpp",
        (_BASE,),
        (
            "--bench={envs}/llama.cpp/build/bin/llama-batched-bench",
            "--gguf={envs}/llama.cpp/f32.gguf",
        ),
    ),
}


def set_up(names: Sequence[str], model: Path) -> dict[str, str]:
    """Run the set-up scripts that these peers need; the reason by name where one fails."""
    ENVIRONMENTS.mkdir(exist_ok=True)
    failed: dict[Path, str] = {}
    for script in sorted({PEERS[name].setup for name in names if PEERS[name].setup.exists()}):
        Console(stderr=True).print(f"set up {script.parent.name}", style="dim")
        made = subprocess.run(
            ["bash", str(script), str(ENVIRONMENTS), str(model), sys.executable],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if made.returncode:
            last = made.stdout.strip().splitlines()[-1:] or ["no message"]
            failed[script] = f"set-up failed: {last[0]}"
            Console(stderr=True).print(f"{script.parent.name}: {failed[script]}", style="red")
    return {name: failed[PEERS[name].setup] for name in names if PEERS[name].setup in failed}


def start(name: str, model: Path, threads: int, adapters: Sequence[Path] = ()) -> Peer:
    """Start it; :meth:`Peer.wait_until_ready` tells when it is loaded. Raises OSError."""
    spec = PEERS[name]
    command = [spec.python, str(PEERS_FOLDER / spec.folder / "runner.py")]
    command += [f"--model={model}", f"--threads={threads}"]
    command += [argument.format(**_WHERE) for argument in spec.arguments]
    if spec.adapters:
        command += ["--adapters", *map(str, adapters[: spec.adapters])]
    return Peer(name, command, {"OMP_NUM_THREADS": str(threads), **spec.environment})
