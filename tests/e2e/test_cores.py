"""A server's threads wait for the cores that the engine's offer, where its model is a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefixd_server.native import kernels

ROOT = Path(__file__).parents[2]

# A process of its own, as the thread that starts a server keeps its policy.
SERVER = """
import json, os, sys, threading
from pathlib import Path
from tests.support.server import LiveServer

os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
with LiveServer(Path(sys.argv[1]), sys.argv[2]) as live, live.client() as client:
    assert (live.server.model.program is not None) == (sys.argv[3] == "program")
    client.generate("base", "fox", max_new_tokens=2)
    client.tasks()
    print(json.dumps({t.name: os.sched_getscheduler(t.native_id) for t in threading.enumerate()}))
"""


@pytest.mark.skipif(kernels.load() is None, reason="there is no C++ compiler")
@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux's policies")
@pytest.mark.parametrize("runs_as", ["program", "modules"])
def test_policies(model: Path, tmp_path: Path, runs_as: str) -> None:
    command = [sys.executable, "-c", SERVER, str(model), str(tmp_path / "store"), runs_as]
    # Without products of our own there are no programs.
    isa = {} if runs_as == "program" else {"PREFIXD_NATIVE_ISA": "generic"}
    ran = subprocess.run(
        command, cwd=ROOT, env=os.environ | isa, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    policies = json.loads(ran.stdout.splitlines()[-1])
    assert policies.pop("prefixd-engine") == os.SCHED_OTHER
    others = {policies[name] for name in ("MainThread", "uvicorn", "prefix-feed")}
    assert others == {os.SCHED_BATCH if runs_as == "program" else os.SCHED_OTHER}
