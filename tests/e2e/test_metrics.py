"""``/metrics`` of a server that has served: where prefixes were found, what prompts shared."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from prefixd import Client
from prefixd_server.config import CacheConfig
from tests.support.server import KV_BYTES, LiveServer

PROMPT = "The quick brown fox jumps over the lazy dog. " * 4
NUM_VIRTUAL_TOKENS = 5


def figures(server: LiveServer) -> dict[str, float]:
    """``name`` or ``name{label=value}``, of one label at most."""
    text = httpx.get(f"{server.url}/metrics").text
    return {
        sample.name
        + "".join(f"{{{k}={v}}}" for k, v in sample.labels.items() if k == "tier"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_miss_a_hit_an_eviction_and_a_shared_prompt(
    model: Path, prefixes: list[Path], tmp_path: Path
) -> None:
    cache = CacheConfig(kv_cache_bytes=KV_BYTES, page_size=4, max_device_prefixes=1)
    with LiveServer(model, str(tmp_path), cache=cache) as server, server.client() as client:
        for task, prefix in zip(("a", "b"), prefixes, strict=False):
            client.push(task, prefix)

        def ask(client: Client, task: str) -> dict[str, float]:
            client.generate(task, PROMPT, max_new_tokens=2)
            return figures(server)

        none = figures(server)
        assert none["prefixd_tasks"] == 2
        assert none["prefixd_prefix_resident{tier=device}"] == 0
        missed = ask(client, "a")
        assert missed["prefixd_prefix_resident{tier=device}"] == 1
        assert missed["prefixd_prefix_resident_bytes{tier=device}"] > 0
        assert missed["vllm:prefix_cache_hits_total"] == 0
        found = ask(client, "a")
        assert found["prefixd_prefix_hits_total{tier=device}"] == 1 + missed.get(
            "prefixd_prefix_hits_total{tier=device}", 0
        )
        asked = len(server.server.model.tokenizer(PROMPT).input_ids)
        # All full pages of the prompt, but for its last token.
        assert found["vllm:prefix_cache_hits_total"] == (asked - 1) // 4 * 4
        other = ask(client, "b")
        assert other["prefixd_prefix_evictions_total{tier=device}"] == 1
        assert other["prefixd_prefix_resident{tier=device}"] == 1
        assert other["vllm:prefix_cache_hits_total"] == found["vllm:prefix_cache_hits_total"]
        assert other["vllm:prefix_cache_queries_total"] == pytest.approx(3 * asked, abs=3)
