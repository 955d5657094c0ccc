"""compose.yaml, .env.example and the server's configuration name the same settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prefixd_server.config import Config
from tests.docker.files import (
    DOCKER,
    DOCKERFILES,
    example_settings,
    interpolate,
    load_yaml,
    parse_dockerfile,
    seconds,
    strings,
    variables,
)

COMPOSE = load_yaml("compose.yaml")
OVERRIDE = load_yaml("compose.cuda.yaml")
SERVER_ENVIRONMENT = COMPOSE["services"]["prefixd"]["environment"]


def configured() -> dict[str, object]:
    """The environment variable of every field of Config → the field's default."""
    return {
        f"PREFIXD_{name.upper()}": value
        for section in Config().model_dump().values()
        for name, value in section.items()
    }


def used() -> dict[str, str]:
    """Every variable that the compose files read → the default they give it."""
    found: dict[str, str] = {}
    for text in strings([COMPOSE, OVERRIDE]):
        found |= variables(text)
    for service in COMPOSE["services"].values():
        passed = service.get("environment", {})
        found |= {name: "" for name, value in passed.items() if value is None}
    return found


def test_every_setting_of_the_server_in_compose_is_one_it_has() -> None:
    given = {*SERVER_ENVIRONMENT, *OVERRIDE["services"]["prefixd"]["environment"]}
    assert {name for name in given if name.startswith("PREFIXD_")} <= set(configured())


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.suffix)
def test_every_setting_of_the_server_in_an_image_is_one_it_has(path: Path) -> None:
    names = re.findall(r"PREFIXD_\w+", " ".join(parse_dockerfile(path)[-1].all("ENV")))
    assert names
    # Where the kernels were compiled is no setting of a server: the image's build has it too.
    assert set(names) - {"PREFIXD_NATIVE_DIR"} <= set(configured())


def test_the_example_names_every_variable_and_no_other() -> None:
    assert set(example_settings()) == set(used())


def shown(value: object) -> str:
    """A default as the example writes it; the server's own choice is an empty value."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def test_the_example_shows_the_real_defaults() -> None:
    defaults = {name: shown(value) for name, value in configured().items()}
    defaults |= {name: rest[2:] for name, rest in used().items() if rest.startswith(":-")}
    defaults["PREFIXD_STORE"] = ""  # compose makes it from the password, which has no default
    inactive = {name: value for name, (value, active) in example_settings().items() if not active}
    assert inactive == {name: defaults.get(name, "") for name in inactive}


def test_only_the_secrets_must_be_set_and_they_have_no_default() -> None:
    required = {name for name, rest in used().items() if rest.startswith(":?")}
    active = {name: value for name, (value, active) in example_settings().items() if active}
    assert active == dict.fromkeys(required, "")
    assert required == {"REDIS_PASSWORD", "GRAFANA_PASSWORD"}


def test_every_line_of_the_example_has_a_word_about_it() -> None:
    """A setting stands under a comment, or in a block of settings that shares one."""
    comment_seen = False
    for line in (DOCKER / ".env.example").read_text().splitlines():
        is_setting = re.fullmatch(r"(# )?[A-Z][A-Z0-9_]*=.*", line) is not None
        if not line or line.startswith("# ---"):
            comment_seen = False
        elif is_setting:
            assert comment_seen, line
        else:
            assert line.startswith("# "), line
            comment_seen = True


def test_the_store_is_the_redis_of_the_project_with_its_password() -> None:
    url = interpolate(SERVER_ENVIRONMENT["PREFIXD_STORE"], {"REDIS_PASSWORD": "secret"})
    assert url == "redis://:secret@redis:6379/0"
    other = interpolate(SERVER_ENVIRONMENT["PREFIXD_STORE"], {"PREFIXD_STORE": "/var/lib/x"})
    assert other == "/var/lib/x"


def test_a_drain_ends_before_the_server_is_killed() -> None:
    grace = seconds(interpolate(COMPOSE["services"]["prefixd"]["stop_grace_period"]))
    # What the end of the drain cuts off still has to be answered.
    assert grace >= Config().http.drain_timeout_s + 10
