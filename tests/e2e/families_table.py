"""Writes docs/models.md from the families that ``test_families.py`` runs:

``python -m tests.e2e.families_table > docs/models.md``
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.support.families import FAMILIES, REFUSED, Family

__all__ = ["DOCUMENT", "models_page"]

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"

_PAGE = """\
# Models

prefixd runs transformers' own modelling code and replaces the attention function alone, through
`AttentionInterface`. No family has code of its own, so one that is not listed may work: at start-up
a short packed step is run and compared with the model's own attention, and a model that differs is
refused by name, with the reason.

## What is served

Each row is a test (`tests/e2e/test_families.py`): random weights, prefixes of 1, 20 and 130 tokens
and the base model in one batch, prompts of 1 to 70 tokens. Greedy tokens are those of
`PeftModel.generate`, and log-probabilities agree to 1e-4 in float32.

{served}

This page is written by `python -m tests.e2e.families_table`.

**Sliding windows.** A prefix ages out like any token: in a layer with a window of W, a token sees
the W - 1 tokens before it, those of the prefix among them. So of a prefix longer than the window,
such a layer shows the first prompt token the last W - 1 rows and no token the rest, in PEFT as
here. Where every layer has a window, a prefix is worth no more than W - 1 tokens.

**RoPE that depends on the batch** (`longrope`, `dynamic`): beyond the original context,
transformers turns all sequences of a batch by the longest one. Contexts up to there are served, and
a larger `--max-model-len` is refused.

## What is refused at start-up

{refused}

The tiny models of the tests said so; numbers in the reasons are theirs. Models with state-space,
convolution or linear-attention layers have no KV for a prefix there, and are refused as Mamba is.
GPT-J's attention goes through the interface from transformers 5.24 on; with earlier ones it is
refused.
"""


def models_page() -> str:
    return _PAGE.format(
        served=_table("particular", FAMILIES.values()),
        refused=_table("because", REFUSED.values()),
    )


def _table(heading: str, families: Iterable[Family]) -> str:
    rows = [f"| {family.title} | `{family.model_type}` | {family.notes} |" for family in families]
    return "\n".join([f"| family | `model_type` | {heading} |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(models_page(), end="")
