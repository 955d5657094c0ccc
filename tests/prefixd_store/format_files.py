"""Files of the format for its tests: a good one by hand, and what to make others of."""

from __future__ import annotations

from typing import Any

from tests.prefixd_store.checkpoints import raw_file

DTYPES = ["float32", "float16", "bfloat16"]


def metadata(tokens: int = 5, **changes: str | None) -> dict[str, str]:
    values = {
        "format": "prefixd",
        "format_version": "1",
        "num_virtual_tokens": str(tokens),
        "query_offset": str(tokens),
    } | changes
    return {key: value for key, value in values.items() if value is not None}


def good_header() -> dict[str, Any]:
    """Two tensors of 64 bytes: [1, 1, 8, 2] float32."""
    tensor = {"dtype": "F32", "shape": [1, 1, 8, 2]}
    return {
        "__metadata__": metadata(8),
        "decoder.key": {**tensor, "data_offsets": [0, 64]},
        "decoder.value": {**tensor, "data_offsets": [64, 128]},
    }


SEVERAL = {
    f"{site}.{part}": (layers, 1, length, 2)
    for site, layers, length in (("cross", 1, 21), ("decoder", 1, 3), ("encoder", 2, 7))
    for part in ("key", "value")
}
"""shapes of a prefix with a length a site"""

GOOD = raw_file(good_header(), bytes(128))
