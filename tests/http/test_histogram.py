"""The oracle is prometheus_client's own histogram, one observation at a time."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from prefixd_server.http.histogram import BatchHistogram

BOUNDS = (0.001, 0.5, 1, 2.5)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.001, 0.0011, 0.5, 0.75, 1.0, 2.5, 64.0]), st.integers(1, 40)
        )
    )
)
def test_many_at_once_are_many_one_by_one(observed: list[tuple[float, int]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = BatchHistogram("gap_seconds", "Help.", BOUNDS, {"model_name": "m"})
    ours.register(histogram)
    reference = Histogram("gap_seconds", "Help.", ["model_name"], buckets=BOUNDS, registry=theirs)
    for amount, count in observed:
        histogram.observe(amount, count)
        for _ in range(count):
            reference.labels("m").observe(amount)
    reference.labels("m")
    assert _numbers(ours) == _numbers(theirs)


def _numbers(registry: CollectorRegistry) -> dict[str, float]:
    lines = generate_latest(registry).decode().splitlines()
    named = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: round(float(value), 6) for name, value in named if "_created" not in name}
