"""The workloads of the server, one after the other: ``python bench/all.py --size smoke``."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from harness.options import parser
from rich.console import Console

BENCHMARKS = ("throughput", "cartridge", "latency", "zipf", "startup")


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--peers", help="of throughput.py; default: the size's own")
    options_parser.add_argument(
        "--benchmarks", default=",".join(BENCHMARKS), help="comma-separated; default: all"
    )
    arguments = options_parser.parse_args()
    console = Console(stderr=True)
    failed = []
    for name in arguments.benchmarks.split(","):
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py"))]
        command += [f"--size={arguments.size}", f"--threads={arguments.threads}"]
        command += [f"--server-args={arguments.server_args}"]
        command += ["--no-save"] if arguments.no_save else []
        if name == "throughput" and arguments.peers is not None:
            command.append(f"--peers={arguments.peers}")
        start = time.perf_counter()
        if subprocess.run(command).returncode:
            failed.append(name)
        console.print(f"{name}: {time.perf_counter() - start:.0f} s", style="bold")
    if failed:
        console.print(f"failed: {', '.join(failed)}", style="red")
        sys.exit(1)


if __name__ == "__main__":
    main()
