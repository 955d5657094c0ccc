"""What Prometheus reads: vLLM's names where the meaning is vLLM's, ours for what only we have.

One :class:`Metrics` a server, with a registry of its own: nothing here is global. Its methods are
the observers that the frontend and residency are given; they only add numbers, on any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prefixd_server.http.histogram import BatchHistogram
from prefixd_server.types import FinishReason
from prefixd_store.records import TaskRecord

__all__ = ["CONTENT_TYPE", "EngineGauges", "Metrics", "PromptCacheUsage"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

OTHER = "_other"
"""the task label of those past the cap; no task can be called so"""
BASE = "base"

# vLLM's words, which dashboards for it select by.
_FINISHED = {
    FinishReason.EOS: "stop",
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORTED: "abort",
    FinishReason.ERROR: "error",
}

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_E2E = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
_LOAD = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class PromptCacheUsage(NamedTuple):
    queries: int
    """tokens of the prompts that were looked up"""
    hits: int
    """those of them that were there"""
    pages: int
    """that can be found, in use or not"""
    evictions: int


class EngineGauges(NamedTuple):
    """Read when Prometheus asks."""

    running: int
    waiting: int
    kv_cache_usage: float
    """0 … 1 of the pages"""
    preemptions: int
    resident: Mapping[str, int]
    """tier (``device``, ``host``) → prefixes there"""
    resident_bytes: Mapping[str, int]
    """tier → bytes that they take"""
    loads: Mapping[str, int]
    """state (``queued``, ``fetching``, ``copying``) → loads in it"""
    tasks: int
    """registered, of all tenants"""
    prompt_cache: PromptCacheUsage


class Metrics:
    def __init__(self, model_name: str, *, max_tasks: int = 200) -> None:
        self.registry = CollectorRegistry()
        self._max_tasks = max_tasks
        self._tasks: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._model = model_name

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(name, help, labels, registry=self.registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, help, labels, buckets=buckets, registry=self.registry)

        of_model = "model_name"
        self._ttft = histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first token.", _TTFT, of_model
        ).labels(model_name)
        self._itl = BatchHistogram(
            "vllm:inter_token_latency_seconds",
            "Between two tokens of a sequence.",
            _ITL,
            {of_model: model_name},
        )
        self.registry.register(self._itl)
        self._e2e = histogram(
            "vllm:e2e_request_latency_seconds", "Arrival to last token.", _E2E, of_model
        ).labels(model_name)
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens run.", of_model).labels(
            model_name
        )
        self._generation_tokens = counter(
            "vllm:generation_tokens", "Tokens generated.", of_model
        ).labels(model_name)
        self._success = counter(
            "vllm:request_success", "Sequences finished.", of_model, "finished_reason"
        )
        self._task_requests = counter(
            "prefixd_task_requests", "Requests answered, by task.", "tenant", "task"
        )
        self._task_tokens = counter(
            "prefixd_task_tokens", "Tokens generated, by task.", "tenant", "task"
        )
        self._task_e2e = histogram(
            "prefixd_task_e2e_seconds", "Arrival to last token, by task.", _E2E, "tenant", "task"
        )
        self._http = counter(
            "prefixd_http_requests", "HTTP requests, by route.", "method", "route", "status"
        )
        self._load = histogram(
            "prefixd_prefix_load_seconds", "A prefix's load out of a tier.", _LOAD, "tier"
        )
        self._hits = counter("prefixd_prefix_hits", "Where requests found their prefix.", "tier")
        self._evictions = counter(
            "prefixd_prefix_evictions", "Prefixes that lost their place in a tier.", "tier"
        )
        for tier in ("device", "host"):  # a rate needs the zero before the first
            self._evictions.labels(tier)
        self._swaps = counter("prefixd_swaps", "Changes of what a task name means.")

    def bind_engine(self, read: Callable[[], EngineGauges]) -> None:
        """Show what ``read`` returns, asked at every scrape."""
        self.registry.register(_EngineCollector(self._model, read))

    def render(self) -> bytes:
        return generate_latest(self.registry)

    # --- frontend --------------------------------------------------------------------------------
    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def inter_token(self, seconds: float, count: int) -> None:
        self._itl.observe(seconds, count)

    def finished(
        self,
        reason: FinishReason,
        seconds: float,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        tenant: str,
        task: str | None,
    ) -> None:
        self._success.labels(self._model, _FINISHED[reason]).inc()
        self._prompt_tokens.inc(prompt_tokens)
        self._generation_tokens.inc(completion_tokens)
        labels = self._task_labels(tenant, task or BASE)
        self._task_requests.labels(*labels).inc()
        self._task_tokens.labels(*labels).inc(completion_tokens)
        if reason in (FinishReason.ABORTED, FinishReason.ERROR):
            return  # how long a client waited before it left says nothing of the server
        self._e2e.observe(seconds)
        self._task_e2e.labels(*labels).observe(seconds)

    # --- residency -------------------------------------------------------------------------------
    def hit(self, tier: str) -> None:
        self._hits.labels(tier).inc()

    def load_seconds(self, tier: str, seconds: float) -> None:
        self._load.labels(tier).observe(seconds)

    def eviction(self, tier: str) -> None:
        self._evictions.labels(tier).inc()

    # --- http ------------------------------------------------------------------------------------
    def http_request(self, method: str, route: str, status: int) -> None:
        self._http.labels(method, route, str(status)).inc()

    def task_changed(self, old: TaskRecord | None, new: TaskRecord | None) -> None:
        """The registry's listener: counts swaps, on every replica that takes one in."""
        if old is not None and new is not None and old.split != new.split:
            self._swaps.inc()

    def _task_labels(self, tenant: str, task: str) -> tuple[str, str]:
        """The labels of a task's series; past the cap all share one series."""
        key = (tenant, task)
        with self._lock:
            if key not in self._tasks:
                if len(self._tasks) >= self._max_tasks:
                    return (OTHER, OTHER)
                self._tasks.add(key)
        return key


class _EngineCollector(Collector):
    def __init__(self, model_name: str, read: Callable[[], EngineGauges]) -> None:
        self._model_name = model_name
        self._read = read

    def collect(self) -> Iterable[Metric]:
        now = self._read()
        yield self._gauge("vllm:num_requests_running", "Sequences in the batch.", now.running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences not admitted yet.", now.waiting)
        yield self._gauge(
            "vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", now.kv_cache_usage
        )
        yield self._counter(
            "vllm:num_preemptions", "Sequences put back for want of pages.", now.preemptions
        )
        prompts = now.prompt_cache
        yield self._counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the cache.", prompts.queries
        )
        yield self._counter(
            "vllm:prefix_cache_hits", "Prompt tokens found in the cache.", prompts.hits
        )
        yield GaugeMetricFamily(
            "prefixd_prompt_cache_pages", "KV pages that prompts can share.", prompts.pages
        )
        yield CounterMetricFamily(
            "prefixd_prompt_cache_evictions", "Cached pages given away.", prompts.evictions
        )
        yield GaugeMetricFamily("prefixd_tasks", "Tasks registered.", value=now.tasks)
        resident = GaugeMetricFamily(
            "prefixd_prefix_resident", "Prefixes in a tier.", labels=["tier"]
        )
        yield _filled(resident, now.resident)
        taken = GaugeMetricFamily(
            "prefixd_prefix_resident_bytes", "Memory that a tier's prefixes take.", labels=["tier"]
        )
        yield _filled(taken, now.resident_bytes)
        loads = GaugeMetricFamily("prefixd_prefix_loads", "Loads under way.", labels=["state"])
        yield _filled(loads, now.loads)

    def _gauge(self, name: str, help: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, help, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, help: str, value: int) -> CounterMetricFamily:
        family = CounterMetricFamily(name, help, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family


def _filled(family: GaugeMetricFamily, values: Mapping[str, int]) -> GaugeMetricFamily:
    for label, value in sorted(values.items()):
        family.add_metric([label], value)
    return family
