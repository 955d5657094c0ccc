"""The compose files against the rules of the compose specification that matter here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.docker.files import DOCKER, ROOT, interpolate, load_yaml, parse_dockerfile, seconds
from tests.docker.source import routes
from tests.docker.test_dockerfiles import EXACT_TAG

COMPOSE = load_yaml("compose.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
each_service = pytest.mark.parametrize("name", SERVICES)

TOP_LEVEL = {"name", "services", "networks", "volumes"}
SERVICE_KEYS = {
    "build", "cap_drop", "command", "depends_on", "deploy", "environment", "healthcheck", "image",
    "init", "logging", "mem_limit", "networks", "pids_limit", "ports", "read_only", "restart",
    "security_opt", "stop_grace_period", "tmpfs", "user", "volumes",
}  # fmt: skip
HEALTH_KEYS = {"test", "interval", "timeout", "retries", "start_period", "start_interval"}


def published(name: str) -> list[tuple[str, str, str]]:
    """(address, host port, container port) of each published port."""
    ports = (interpolate(port).split(":") for port in SERVICES[name].get("ports", []))
    return [(address, host, container) for address, host, container in ports]


def mounts(name: str) -> list[tuple[str, str]]:
    """(source, target) of each volume."""
    parts = (interpolate(volume).split(":") for volume in SERVICES[name].get("volumes", []))
    return [(part[0], part[1]) for part in parts]


def test_only_known_keys_are_used() -> None:
    override = load_yaml("compose.cuda.yaml")
    assert {key for key in COMPOSE if not key.startswith("x-")} <= TOP_LEVEL
    assert set(override) == {"services"}
    assert set(override["services"]) <= set(SERVICES)
    for service in (*SERVICES.values(), *override["services"].values()):
        assert set(service) <= SERVICE_KEYS
        assert set(service.get("healthcheck", {})) <= HEALTH_KEYS


@each_service
def test_images_are_pinned_to_an_exact_version(name: str) -> None:
    assert EXACT_TAG.fullmatch(SERVICES[name]["image"]), SERVICES[name]["image"]


@each_service
def test_containers_are_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"\d+[mg]", interpolate(service["mem_limit"]))
    assert "privileged" not in service


@each_service
def test_everything_named_is_declared(name: str) -> None:
    service = SERVICES[name]
    assert set(service.get("networks", ["default"])) <= set(COMPOSE["networks"])
    for source, target in mounts(name):
        assert target.startswith("/")
        if source.startswith("."):
            assert (DOCKER / source).exists(), source
        else:
            assert source in COMPOSE["volumes"], source
    for other, condition in service.get("depends_on", {}).items():
        assert condition == {"condition": "service_healthy"}
        assert "healthcheck" in SERVICES[other]


def test_every_declared_volume_is_mounted() -> None:
    used = {source for name in SERVICES for source, _ in mounts(name)}
    assert set(COMPOSE["volumes"]) <= used


@each_service
def test_health_checks_are_bounded(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] == "CMD"
    assert seconds(check["timeout"]) <= seconds(check["interval"])
    assert seconds(check["start_interval"]) < seconds(interpolate(check["start_period"]))
    assert check["retries"] >= 1


def test_the_servers_health_is_a_route_that_it_has() -> None:
    dockerfile = parse_dockerfile(ROOT / SERVICES["prefixd"]["build"]["dockerfile"])
    livez = json.loads(dockerfile[-1].last("HEALTHCHECK").split(" CMD ")[1])[-1]
    *_, script, readyz = SERVICES["prefixd"]["healthcheck"]["test"]
    assert f"docker/healthcheck.py {script}" in dockerfile[-1].all("COPY")
    assert {livez, readyz} == {"/livez", "/readyz"}
    assert {("GET", livez), ("GET", readyz)} <= routes()


def test_only_the_loopback_address_is_published_by_default() -> None:
    assert {name for name in SERVICES if published(name)} == {"prefixd", "prometheus", "grafana"}
    assert all(address == "127.0.0.1" for name in SERVICES for address, _, _ in published(name))


def test_ports_agree_everywhere() -> None:
    server = SERVICES["prefixd"]
    port = server["environment"]["PREFIXD_PORT"]
    assert published("prefixd") == [("127.0.0.1", port, port)]
    for dockerfile in ("docker/Dockerfile.cpu", "docker/Dockerfile.cuda"):
        assert parse_dockerfile(ROOT / dockerfile)[-1].last("EXPOSE") == port
    jobs = {job["job_name"]: job for job in load_yaml("prometheus.yml")["scrape_configs"]}
    [discovery] = jobs["prefixd"]["dns_sd_configs"]
    assert (discovery["names"], str(discovery["port"])) == (["prefixd"], port)
    [(_, _, prometheus)] = published("prometheus")
    assert jobs["prometheus"]["static_configs"] == [{"targets": [f"localhost:{prometheus}"]}]
    [source] = load_yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == f"http://prometheus:{prometheus}"
    for name in ("prometheus", "grafana"):
        [(_, _, container)] = published(name)
        assert f"http://127.0.0.1:{container}/" in SERVICES[name]["healthcheck"]["test"][-1]


def test_redis_is_reachable_from_the_server_alone() -> None:
    assert COMPOSE["networks"]["store"] == {"internal": True}
    assert [name for name in SERVICES if "store" in SERVICES[name].get("networks", [])] == [
        "prefixd",
        "redis",
    ]
    assert SERVICES["redis"]["networks"] == ["store"]


def test_builds_point_at_real_files() -> None:
    build = SERVICES["prefixd"]["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    override = load_yaml("compose.cuda.yaml")["services"]["prefixd"]
    for dockerfile in (build["dockerfile"], override["build"]["dockerfile"]):
        assert (ROOT / dockerfile).is_file()
    for argument in build["args"]:
        for path in (build["dockerfile"], override["build"]["dockerfile"]):
            names = [a.split("=")[0] for a in parse_dockerfile(ROOT / path)[0].all("ARG")]
            assert argument in names


def test_the_volumes_cover_what_the_image_writes() -> None:
    targets = {target for _, target in mounts("prefixd")}
    runtime = parse_dockerfile(ROOT / SERVICES["prefixd"]["build"]["dockerfile"])[-1]
    assert set(json.loads(runtime.last("VOLUME"))) <= targets


@pytest.mark.parametrize("override", [[], ["compose.cuda.yaml"]], ids=["cpu", "cuda"])
def test_compose_itself_accepts_the_files(override: list[str], tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker has no compose plugin here")
    settings = tmp_path / "env"
    settings.write_text("REDIS_PASSWORD=a\nGRAFANA_PASSWORD=b\n")
    files = [word for name in ("compose.yaml", *override) for word in ("-f", str(DOCKER / name))]
    command = [docker, "compose", "--env-file", str(settings), *files, "config", "--quiet"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
