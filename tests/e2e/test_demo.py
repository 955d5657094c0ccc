"""``prefixd demo``: the real model, three tasks made on the spot, and curl lines that work."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from prefixd import Client
from prefixd_server.demo import TASKS
from tests.support.models import demo_folder
from tests.support.server import ServerProcess, wait_until


@pytest.mark.slow
def test_what_the_demo_prints_works(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    demo_folder()  # converted now, if it never was, so that the wait below is for the server alone
    options: dict[str, Any] = {"store": tmp_path, "kv_cache_bytes": 256 << 20, "threads": 2}
    with ServerProcess(command="demo", **options) as server, server.client() as client:
        wait_until(lambda: server.stdout.count("curl ") == len(TASKS) + 2, 120, what="the guide")
        assert [task.task for task in client.tasks()] == sorted(task.name for task in TASKS)
        lines = re.findall(r"^curl .*\\\n.*$", server.stdout, re.MULTILINE)
        assert len(lines) == len(TASKS) + 2
        *whole, streamed = [run(line) for line in lines]
        texts = [json.loads(answer)["generated_text"] for answer in whole]
        assert all(texts)
        assert len(set(texts)) == len(texts)
        # The prefix matters: the first line's prompt, asked without one, is answered otherwise.
        assert json.loads(whole[-1])["task"] == "base"
        events = [json.loads(line[6:]) for line in streamed.splitlines() if line]
        assert events[-1]["generated_text"] == texts[0]
        check_chat(client)
        server.terminate()
        assert server.wait() == 0


def check_chat(client: Client) -> None:
    """With the chat template in a task's defaults, its inputs are a user's message."""
    client.update("sentiment", defaults={"chat_template": "model"})
    answer = client.generate("sentiment", "hi", max_new_tokens=2)
    tokenizer = AutoTokenizer.from_pretrained(demo_folder())
    message = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True)
    assert answer.usage.prompt_tokens == len(rendered["input_ids"])


def run(line: str) -> str:
    command = ["bash", "-c", line.replace("curl ", "curl -sS --fail-with-body ", 1)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
