"""JSON from strangers: one object of bounded depth, with nothing Python merely tolerates.

Refused beyond what RFC 8259 refuses: repeated keys (readers disagree on which one wins), ``NaN``
and infinities, integers over 64 bits and lone surrogates (they cannot be written back).
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from prefixd_store.errors import InvalidPrefix

__all__ = ["dumps", "loads"]

MAX_DEPTH = 16


def loads(data: bytes, *, what: str, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Parse UTF-8 ``data``; raises :class:`InvalidPrefix` whose message starts with ``what``."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
        )
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, got {type(value).__name__}")
        _check_values(value, max_depth)
    except RecursionError:
        raise InvalidPrefix(f"{what}: JSON is nested over {max_depth} deep") from None
    except ValueError as error:  # JSONDecodeError and UnicodeError are ValueErrors
        raise InvalidPrefix(f"{what}: not valid JSON: {_short(error)}") from None
    return value


def dumps(value: object) -> str:
    """The one spelling of ``value`` that files are hashed with: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {_short(repr(key))} appears twice")
        result[key] = value
    return result


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _check_values(value: object, max_depth: int) -> None:
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if depth > max_depth:
            raise ValueError(f"nested over {max_depth} deep")
        if isinstance(item, dict):
            stack.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list):
            stack.extend((part, depth + 1) for part in item)
        elif isinstance(item, str):
            item.encode("utf-8")
        elif isinstance(item, int) and not -(2**63) <= item < 2**63:
            raise ValueError("an integer does not fit 64 bits")
        elif isinstance(item, float) and not math.isfinite(item):
            raise ValueError("a number does not fit a float")


def _short(text: object) -> str:
    shown = str(text).encode("utf-8", "backslashreplace").decode()
    return shown if len(shown) <= 200 else shown[:200] + "…"
