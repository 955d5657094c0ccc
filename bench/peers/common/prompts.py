"""The prompts that prefixd and all peers answer."""

from __future__ import annotations

__all__ = ["prompts"]


def prompts(number: int) -> list[str]:
    """Distinct short prompts of 16 to 18 tokens (SmolLM2)."""
    return [
        f"Write one sentence about the number {n} and a place called Blue Spice."
        for n in range(number)
    ]
