"""``prefixd demo``: four tasks that are ready as soon as the server is.

One is a prefix that was trained, which comes with the package; the others are short texts, compiled
to prefixes. They are made through the server's own HTTP API as any client would make them. A task
that is in the store already is left as it is.
"""

from __future__ import annotations

import json
import logging
import threading
from importlib.resources import as_file, files
from typing import NamedTuple

from prefixd import Client, NotFoundError, PrefixdError

__all__ = ["TASKS", "prepare"]

log = logging.getLogger(__name__)


class DemoTask(NamedTuple):
    name: str
    description: str
    prompt: str
    """an example for the visitor to try"""
    text: str | None = None
    """compiled to the task's prefix; None: it is trained, a file in ``demo_data``"""


TASKS = (
    DemoTask(
        "booking",
        "a guest's message to one line of JSON (trained)",
        "Could you put Beatrix Moreau down for Sunday, half past seven?"
        " There will be eight of us.\n",
    ),
    DemoTask(
        "describe",
        "a record to a sentence",
        "name: Blue Spice | type: coffee shop | food: Italian | near: Crowne Plaza\n",
        """\
Turn each record into one sentence.

name: The Vaults | type: pub | price: more than £30 | rating: 5 out of 5
The Vaults is a pub with prices over £30 and a rating of 5 out of 5.

name: The Cambridge Blue | type: pub | food: English | near: Café Brazil
The Cambridge Blue is a pub near Café Brazil that serves English food.

name: Loch Fyne | type: restaurant | food: French | family friendly: yes
Loch Fyne is a family friendly restaurant that serves French food.

""",
    ),
    DemoTask(
        "sentiment",
        "a review to positive or negative",
        "Review: The pasta was cold and the waiter was rude.\nLabel:",
        """\
Label each review as positive or negative.

Review: A warm, funny film with a wonderful cast.
Label: positive

Review: Two hours of my life that I will never get back.
Label: negative

Review: The screen is bright and the battery lasts for days.
Label: positive

Review: It broke after a week and nobody answered my mail.
Label: negative

""",
    ),
    DemoTask(
        "library",
        "questions about one document",
        "Question: What does a late book cost?\nAnswer:",
        """\
Handbook of the Harbour Library.
The library opens at 9 in the morning and closes at 8 in the evening. On Sundays it is closed.
A member may borrow twelve books for four weeks. A late book costs ten cents a day.
The quiet room is on the third floor. The café is beside the main entrance and sells soup until 3.

Questions and answers about the library.
Question: When does the library close?
Answer: It closes at 8 in the evening.
Question: Where can I read in silence?
Answer: In the quiet room on the third floor.
""",
    ),
)

_DEFAULTS = {"parameters": {"max_new_tokens": 40}, "stop": ["\n"]}


def prepare(url: str) -> None:
    """Make the tasks and print how to call them, on a thread: the server is serving meanwhile."""
    threading.Thread(target=_prepare, args=(url,), name="prefixd-demo", daemon=True).start()


def _prepare(url: str) -> None:
    try:
        with Client(url) as client:
            for task in TASKS:
                _ensure(client, task)
    except PrefixdError:
        log.exception("the demo's tasks could not be made")
        return
    print(_guide(url), flush=True)


def _ensure(client: Client, task: DemoTask) -> None:
    try:
        client.task(task.name)
    except NotFoundError:
        _make(client, task)
        client.update(task.name, description=task.description, defaults=_DEFAULTS)


def _make(client: Client, task: DemoTask) -> None:
    if task.text is not None:
        client.compile(task.name, task.text)
        return
    with as_file(files("prefixd_server") / "demo_data" / f"{task.name}.safetensors") as path:
        client.push(task.name, path)


def _guide(url: str) -> str:
    lines = [f"\nprefixd serves {len(TASKS)} tasks at {url} (reference: {url}/docs). Try:\n"]
    trained, *compiled = TASKS
    lines += ["A trained prefix, and the same model without it:\n"]
    lines.append(_curl(url, trained.name, trained.prompt))
    lines.append(_curl(url, "base", trained.prompt, parameters={"max_new_tokens": 40}))
    lines += ["Prefixes made of texts, the last of them as a stream too:\n"]
    lines += [_curl(url, task.name, task.prompt) for task in compiled]
    lines.append(_curl(url, compiled[-1].name, compiled[-1].prompt, stream=True))
    return "\n".join(lines)


def _curl(url: str, task: str, prompt: str, **fields: object) -> str:
    body = json.dumps({"inputs": prompt, **fields}, ensure_ascii=False)
    assert "'" not in body
    return (
        f"curl {'-N ' if fields.get('stream') else ''}{url}/v1/tasks/{task}/generate"
        f" -H 'content-type: application/json' \\\n  -d '{body}'\n"
    )
