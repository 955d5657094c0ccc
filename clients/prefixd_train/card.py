"""What is written about a trained prefix: provenance for machines, a card for people, a curve.

Nothing here depends on the time or the place, so that a run and its resumption write the same.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prefixd_train.loop import Validation
from prefixd_train.sites import Site

__all__ = ["DEFAULT_URL", "curl_line", "model_card", "plot_losses", "provenance"]

DEFAULT_URL = "http://127.0.0.1:8000"
_MAX_PROMPT = 2000
_LIBRARIES = ("prefixd", "torch", "transformers", "accelerate")


def provenance(config: Mapping[str, Any], steps: int, validation: Validation) -> dict[str, Any]:
    """The file's own account of how it came to be: settings, digests, scores, libraries."""
    told = {
        "trained_with": {name: _version(name) for name in _LIBRARIES},
        **config,
        "steps": steps,
        "dev_loss": validation.best_loss,
        "best_step": validation.best_step,
    }
    if validation.best_accuracy is not None:
        told["dev_accuracy"] = validation.best_accuracy
    return told


def model_card(told: Mapping[str, Any], lengths: Mapping[Site, int], prompt: str) -> str:
    """Markdown. ``told`` is the :func:`provenance`, ``lengths`` the prefix's at each site,
    ``prompt`` one of the data's prompts."""
    settings, data = told["settings"], told["data"]
    task = settings["task"]
    rows = {
        "base model": f"{told['base_model']}, fingerprint `{told['base_fingerprint']}`",
        "prefix": _prefix_row(lengths),
        "parameterisation": settings["parameterisation"],
        "initialised from": settings["init"],
        "training data": _data_row(data["train"]),
        "validation data": _data_row(data["dev"]) if data["dev"] else "none",
        "steps": f"{told['steps']} of {settings['batch_size']} x {settings['grad_accum']} examples",
        "AdamW": f"lr {told['learning_rate']:g}, {settings['schedule']}, warm-up "
        f"{settings['warmup']:g}, weight decay {settings['weight_decay']:g}",
        "seed": settings["seed"],
        "libraries": ", ".join(f"{k} {v}" for k, v in told["trained_with"].items()),
    }
    if "document" in data:
        rows["distilled from"] = "{file}, {tokens} tokens, sha256 `{sha256:.12}`".format(
            **data["document"]
        )
    if told["dev_loss"] is not None:
        rows["validation loss"] = f"{told['dev_loss']:.4f} nats a token, step {told['best_step']}"
    if "dev_accuracy" in told:
        rows["validation token accuracy"] = f"{told['dev_accuracy']:.2%}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""# {task}

A prefix for {told["base_model"]}, trained with the model frozen. The file is `prefix.safetensors`.

| | |
|---|---|
{table}

## Use

```sh
prefixd push {task} prefix.safetensors
{curl_line(DEFAULT_URL, task, prompt)}
```

All settings:

```json
{json.dumps(settings, indent=2)}
```
"""


def curl_line(url: str, task: str, prompt: str) -> str:
    """A line of shell that asks the task for an answer to that prompt."""
    route = f"{url.rstrip('/')}/v1/tasks/{task}/generate"
    body = json.dumps({"inputs": prompt[:_MAX_PROMPT]}, ensure_ascii=False)
    return f"curl {shlex.quote(route)} -H 'content-type: application/json' -d {shlex.quote(body)}"


def plot_losses(metrics: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw the curves of training and validation; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in {"loss": "training", "dev_loss": "validation"}.items():
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.legend()
    figure.savefig(path)
    return True


def _prefix_row(lengths: Mapping[Site, int]) -> str:
    if len(set(lengths.values())) == 1:
        return f"{next(iter(lengths.values()))} virtual tokens at {', '.join(lengths)}"
    return "virtual tokens: " + ", ".join(f"{length} at {site}" for site, length in lengths.items())


def _data_row(data: Mapping[str, Any]) -> str:
    return (
        f"{data['file']}, {data['examples']} examples, {data['target_tokens']} target tokens, "
        f"sha256 `{data['sha256'][:12]}`"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
