"""Prometheus' rules and Grafana's dashboard: every metric they read is one the server defines."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker.files import DOCKER, load_yaml
from tests.docker.source import METRIC, metric_words, metrics, routes

DASHBOARD: dict[str, Any] = json.loads((DOCKER / "grafana/dashboards/prefixd.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [rule for group in load_yaml("alerts.yml")["groups"] for rule in group["rules"]]
ALERTS_TEST = Path(__file__).parent / "alerts_test.yml"

INTERFACE = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:num_preemptions_total",
    "prefixd_prefix_resident",
    "prefixd_prefix_load_seconds",
    "prefixd_prefix_hits_total",
    "prefixd_prefix_evictions_total",
    "prefixd_swaps_total",
    "prefixd_task_requests_total",
    "prefixd_task_tokens_total",
    "prefixd_task_e2e_seconds",
}


def expressions() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def series(expression: str) -> set[str]:
    """The metrics of a PromQL expression, a histogram's parts as the histogram."""
    found = (match[0] for match in METRIC.finditer(re.sub(r'"[^"]*"', "", expression)))
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in found}


def defined() -> set[str]:
    """Metrics as they are exposed: a counter's `_total` may be left to the library."""
    return {form for name in metrics() for form in (name, name + "_total")}


def test_every_metric_of_the_alerts_and_the_dashboard_is_defined() -> None:
    read = {
        name
        for text in (*expressions(), *(rule["expr"] for rule in RULES))
        for name in series(text)
    }
    assert read <= defined(), read - defined()


def test_every_label_that_is_grouped_by_or_filtered_is_one_the_server_gives() -> None:
    from_prometheus = {"instance", "job", "le"}
    for text in (*expressions(), *(rule["expr"] for rule in RULES)):
        grouped = re.findall(r"\bby \(([^)]*)\)", text)
        filtered = re.findall(r"[{,]\s*(\w+)(?:=|!=|=~|!~)\"", text)
        labels = {label.strip() for group in grouped for label in group.split(",")} | {*filtered}
        assert labels <= metric_words() | from_prometheus, text


def test_the_dashboard_shows_every_metric_of_the_interface() -> None:
    assert {name for text in expressions() for name in series(text)} >= INTERFACE


def test_alerts_that_look_at_one_route_name_one_that_exists() -> None:
    named = {path for rule in RULES for path in re.findall(r'route="([^"]+)"', rule["expr"])}
    left_out = {
        p
        for rule in RULES
        for ps in re.findall(r'route!~"([^"]+)"', rule["expr"])
        for p in ps.split("|")
    }
    assert named == {"/readyz"}
    assert named | left_out <= {path for _, path in routes()}


def test_histograms_are_read_through_their_buckets() -> None:
    for text in (*expressions(), *(rule["expr"] for rule in RULES)):
        assert ("histogram_quantile" in text) == ("_bucket{" in text or "_bucket[" in text), text


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_say_how_bad_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert set(rule["annotations"]) == {"summary", "description"}
    assert re.fullmatch(r"\d+m", rule["for"])


def test_the_dashboard_is_whole() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        box = panel["gridPos"]
        assert box["x"] + box["w"] <= 24, panel["title"]
        rows, columns = range(box["y"], box["y"] + box["h"]), range(box["x"], box["x"] + box["w"])
        cells = {(y, x) for y in rows for x in columns}
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_the_dashboard_is_provisioned_over_a_provisioned_source() -> None:
    [provider] = load_yaml("grafana/provisioning/dashboards/prefixd.yaml")["providers"]
    mounts = [v.split(":") for v in load_yaml("compose.yaml")["services"]["grafana"]["volumes"]]
    targets = {source: target for source, target, *_ in mounts}
    assert targets["./grafana/dashboards"] == provider["options"]["path"]
    assert targets["./grafana/provisioning"] == "/etc/grafana/provisioning"
    [source] = load_yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    variables = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == source["uid"]
    known = {*variables, "__rate_interval"}
    assert {n for text in expressions() for n in re.findall(r"\$(\w+)", text)} <= known


def promtool(*arguments: str) -> None:
    program = shutil.which("promtool")
    if not program:
        pytest.skip("promtool is not installed")
    answer = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    settings = tmp_path / "prometheus.yml"
    text = (DOCKER / "prometheus.yml").read_text()
    settings.write_text(text.replace("/etc/prometheus", str(DOCKER)))
    promtool("check", "config", str(settings))


def test_promtool_accepts_the_dashboards_expressions(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{i}", "expr": text.replace("$__rate_interval", "1m").replace("$", "")}
        for i, text in enumerate(expressions())
    ]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(path))


def test_the_alerts_fire_when_they_should(tmp_path: Path) -> None:
    tests = yaml.safe_load(ALERTS_TEST.read_text())
    tests["rule_files"] = [str(DOCKER / "alerts.yml")]
    path = tmp_path / "alerts_test.yml"
    path.write_text(yaml.safe_dump(tests))
    tested = {t["alertname"] for group in tests["tests"] for t in group["alert_rule_test"]}
    assert tested == {rule["alert"] for rule in RULES}
    promtool("test", "rules", str(path))
