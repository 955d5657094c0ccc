"""``prefixd demo``: the real model, a trained task that works, and curl lines that do."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bench.demo_task import train_rows
from prefixd import Client
from prefixd_server.demo import TASKS
from prefixd_store import fingerprint_folder, validate_file
from tests.support.models import demo_folder
from tests.support.server import ServerProcess, wait_until

# Names that no row of the training has.
HELD_OUT = {
    "Hi, this is Greta Nilsson. Could we have a table for three on Tuesday at 6 pm?": (
        "Greta Nilsson",
        3,
        "Tuesday",
        "6:00 pm",
    ),
    "Hello, Tobias Marsh here, I would like to book for nine people, Friday at 8:30 pm.": (
        "Tobias Marsh",
        9,
        "Friday",
        "8:30 pm",
    ),
    "Please keep a table for two for Ingrid Falk on Sunday, half past five.": (
        "Ingrid Falk",
        2,
        "Sunday",
        "5:30 pm",
    ),
    "My name is Rafael Ortega and we are 7. Is Wednesday at nine o'clock still free?": (
        "Rafael Ortega",
        7,
        "Wednesday",
        "9:00 pm",
    ),
    "Saturday at 7:30 pm, ten of us, under Maud Winther. Thanks!": (
        "Maud Winther",
        10,
        "Saturday",
        "7:30 pm",
    ),
    "Good morning! A table on Monday for four, please, at 9 pm. The name is Colin Baxter.": (
        "Colin Baxter",
        4,
        "Monday",
        "9:00 pm",
    ),
    "We will be six on Thursday. We would come at half past eight. Regards, Amara Obi": (
        "Amara Obi",
        6,
        "Thursday",
        "8:30 pm",
    ),
    "Stefan Gruber calling: can you fit in 5 of us at seven o'clock on Sunday?": (
        "Stefan Gruber",
        5,
        "Sunday",
        "7:00 pm",
    ),
    "Do you have room for eight at 5:30 pm this Friday? It is for Helena Brandt.": (
        "Helena Brandt",
        8,
        "Friday",
        "5:30 pm",
    ),
    "Could you put Louis Carver down for Tuesday, six o'clock? There will be two of us.": (
        "Louis Carver",
        2,
        "Tuesday",
        "6:00 pm",
    ),
}


def test_the_trained_prefix_is_of_this_model_and_our_data() -> None:
    manifest = validate_file(Path(str(files("prefixd_server") / "demo_data/booking.safetensors")))
    assert manifest.base_fingerprint == fingerprint_folder(demo_folder())
    rows = "".join(json.dumps(row) + "\n" for row in train_rows()).encode()
    told = manifest.provenance["data"]["train"]["sha256"]
    assert told == hashlib.sha256(rows).hexdigest()


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
        assert json.loads(texts[0]) == booking("Beatrix Moreau", 8, "Sunday", "7:30 pm")
        assert json.loads(whole[1])["task"] == "base"
        events = [json.loads(line[6:]) for line in streamed.splitlines() if line]
        assert events[-1]["generated_text"] == texts[-1]
        check_what_is_learnt(client)
        check_chat(client)
        server.terminate()
        assert server.wait() == 0


def check_what_is_learnt(client: Client) -> None:
    right = {"booking": 0, "base": 0}
    for message, fields in HELD_OUT.items():
        expected = json.dumps(booking(*fields))
        for task in right:
            answer = client.generate(task, f"{message}\n", max_new_tokens=40, stop=["\n"])
            right[task] += answer.generated_text.strip() == expected
    # Eight where it was trained; a CPU that rounds differently may lose one or two.
    assert right["booking"] >= 6
    assert right["base"] <= 2


def booking(name: str, guests: int, day: str, time: str) -> dict[str, Any]:
    return {"name": name, "guests": guests, "day": day, "time": time}


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
