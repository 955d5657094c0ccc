from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prefixd_server.prefix.host_cache import HostCache, HostPrefix
from prefixd_server.types import PrefixKey

ARRAY = np.zeros((1, 1, 1, 1), np.float32)
operations = st.lists(
    st.tuples(st.sampled_from(["put", "get", "discard"]), st.integers(0, 5), st.integers(1, 40))
)


def prefix(nbytes: int) -> HostPrefix:
    return HostPrefix({"decoder": (ARRAY, ARRAY)}, "float32", nbytes)


def key(number: int) -> PrefixKey:
    return PrefixKey("default", str(number))


@given(st.integers(0, 100), operations)
def test_is_a_byte_bounded_lru(max_bytes: int, steps: list[tuple[str, int, int]]) -> None:
    cache = HostCache(max_bytes)
    model: list[tuple[int, int]] = []  # (number, bytes), least recent first
    for operation, number, nbytes in steps:
        held = next((item for item in model if item[0] == number), None)
        if operation == "put" and held is None:
            dropped = cache.put(key(number), prefix(nbytes))
            if nbytes > max_bytes:
                assert dropped is None
                continue
            model.append((number, nbytes))
            gone = []
            while sum(size for _, size in model) > max_bytes:
                gone.append(model.pop(0))
            assert dropped is not None
            assert [k for k, _ in dropped] == [key(n) for n, _ in gone]
        elif operation == "get":
            found = cache.get(key(number))
            assert (found.nbytes if found else None) == (held[1] if held else None)
            if held:
                model.remove(held)
                model.append(held)
        elif operation == "discard":
            cache.discard(key(number))
            model = [item for item in model if item[0] != number]
        cache.check()
        assert {n for n in range(6) if key(n) in cache} == {n for n, _ in model}
        assert cache.num_bytes == sum(size for _, size in model)
        assert len(cache) == len(model)
