"""What Prometheus reads."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from prefixd_server.http.metrics import Metrics
from prefixd_server.types import FinishReason
from tests.http.harness import wait_until

GENERATE = {"inputs": "the quick brown fox", "parameters": {"max_new_tokens": 3}}


def values(client: httpx.Client) -> dict[tuple[str, ...], float]:
    """Every sample of /metrics: (name, label values in order of their names) → value."""
    text = client.get("/metrics").text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "prefixd_tasks",
    "prefixd_prefix_resident",
    "prefixd_prefix_resident_bytes",
    "prefixd_prefix_loads",
    "prefixd_prefix_evictions_total",
    "prefixd_prompt_cache_pages",
    "prefixd_prompt_cache_evictions_total",
    "prefixd_swaps_total",
    "prefixd_task_requests_total",
    "prefixd_task_tokens_total",
    "prefixd_task_e2e_seconds_bucket",
    "prefixd_http_requests_total",
}


def test_metrics_of_a_request(client: httpx.Client, task: str) -> None:
    before = values(client)
    route = "/v1/tasks/{task}/generate"
    http_key = ("prefixd_http_requests_total", "POST", route, "200")
    client.post(f"/v1/tasks/{task}/generate", json=GENERATE)
    wait_until(lambda: values(client).get(http_key, 0) == before.get(http_key, 0) + 1)
    after = values(client)
    assert {name for name, *_ in after} >= NAMES

    def grown(*key: str) -> float:
        return after[key] - before.get(key, 0.0)

    assert grown("vllm:generation_tokens_total", "tiny") == 3
    assert grown("vllm:prompt_tokens_total", "tiny") > 0
    assert grown("vllm:request_success_total", "length", "tiny") == 1
    assert grown("vllm:time_to_first_token_seconds_count", "tiny") == 1
    assert grown("vllm:inter_token_latency_seconds_count", "tiny") > 0
    assert grown("vllm:e2e_request_latency_seconds_count", "tiny") == 1
    assert grown("prefixd_task_requests_total", task, "default") == 1
    assert grown("prefixd_task_tokens_total", task, "default") == 3
    assert after["vllm:kv_cache_usage_perc", "tiny"] == 0.25
    assert after["prefixd_prefix_resident", "host"] == 2
    assert after["prefixd_prefix_resident_bytes", "host"] > 0
    assert after["prefixd_prefix_resident_bytes", "device"] > 0
    assert after["prefixd_prefix_loads", "fetching"] == 0
    assert after["prefixd_tasks",] >= 1


def test_paths_make_no_series(client: httpx.Client) -> None:
    for i in range(3):
        client.get(f"/nothing/{i}")
        client.get(f"/v1/tasks/not-{i}")

    def routes() -> set[str]:
        return {key[2] for key in values(client) if key[0] == "prefixd_http_requests_total"}

    wait_until(lambda: {"unmatched", "/v1/tasks/{task}"} <= routes())
    assert not any("not" in route for route in routes())


def test_activating_is_a_swap(client: httpx.Client, task: str, prefix: bytes) -> None:
    other = bytearray(prefix)
    other[-1] ^= 1
    octets = {"content-type": "application/octet-stream"}
    url = f"/v1/tasks/{task}"
    assert client.put(f"{url}/prefix", content=bytes(other), headers=octets).status_code == 201
    before = values(client)["prefixd_swaps_total",]
    client.post(f"{url}/activate", json={"version": 1})
    client.post(f"{url}/activate", json={"version": 1})
    assert values(client)["prefixd_swaps_total",] == before + 1


def test_tasks_past_the_cap_share_one_series() -> None:
    metrics = Metrics("tiny", max_tasks=2)
    for i in range(5):
        metrics.finished(
            FinishReason.EOS,
            0.1,
            prompt_tokens=1,
            completion_tokens=2,
            tenant="default",
            task=f"t{i}",
        )
    text = metrics.render().decode()
    assert 'prefixd_task_requests_total{task="t1",tenant="default"} 1.0' in text
    assert 'prefixd_task_requests_total{task="_other",tenant="_other"} 3.0' in text
    assert "t2" not in text


def test_residency_s_observer() -> None:
    metrics = Metrics("tiny")
    metrics.hit("device")
    metrics.load_seconds("store", 0.2)
    metrics.eviction("host")
    text = metrics.render().decode()
    assert 'prefixd_prefix_hits_total{tier="device"} 1.0' in text
    assert 'prefixd_prefix_load_seconds_sum{tier="store"} 0.2' in text
    assert 'prefixd_prefix_evictions_total{tier="host"} 1.0' in text
