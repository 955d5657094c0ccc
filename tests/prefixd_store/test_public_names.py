"""What the package gives away is there."""

from __future__ import annotations

import prefixd_store


def test_all_public_names_exist() -> None:
    assert len(set(prefixd_store.__all__)) == len(prefixd_store.__all__)
    for name in prefixd_store.__all__:
        assert getattr(prefixd_store, name) is not None
