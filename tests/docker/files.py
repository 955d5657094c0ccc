"""Readers of the files under docker/: Dockerfiles, .dockerignore, compose files, settings."""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = [DOCKER / "Dockerfile.cpu", DOCKER / "Dockerfile.cuda"]
INSTRUCTIONS = frozenset(
    {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN"}
    | {"STOPSIGNAL", "USER", "VOLUME", "WORKDIR"}
)


@dataclass
class Stage:
    """One build stage: its image with ARGs filled in, its name, its (instruction, rest) pairs."""

    image: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [rest for name, rest in self.steps if name == instruction]

    def last(self, instruction: str) -> str:
        return self.all(instruction)[-1]


def logical_lines(text: str) -> list[str]:
    """Join continued lines and drop comments, also those inside a continued instruction."""
    kept = [
        line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    return "\n".join(kept).replace("\\\n", " ").splitlines()


def parse_dockerfile(path: Path) -> list[Stage]:
    """The stages of a Dockerfile. Raises ValueError on what is not an instruction we use."""
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in logical_lines(path.read_text()):
        name, _, rest = line.strip().partition(" ")
        rest = " ".join(rest.split())
        if name not in INSTRUCTIONS or not rest:
            raise ValueError(f"{path.name}: not an instruction: {line!r}")
        if name == "FROM":
            image, _, stage = rest.partition(" AS ")
            stages.append(Stage(expand(image, arguments), stage))
        elif stages:
            stages[-1].steps.append((name, rest))
        elif name == "ARG":
            key, _, value = rest.partition("=")
            arguments[key] = value
        else:
            raise ValueError(f"{path.name}: {name} before FROM")
    return stages


def expand(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)


def exec_form(text: str) -> list[str]:
    """The JSON array of an exec-form instruction; ValueError for the shell form."""
    words = json.loads(text)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"not exec form: {text}")
    return words


def in_build_context(path: str, ignore: str) -> bool:
    """Whether .dockerignore lets a path (relative to the root) in: the last pattern that matches
    the path or a folder above it decides."""
    parts = Path(path).parts
    candidates = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    included = True
    for line in ignore.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        negated = pattern.startswith("!")
        glob = pattern.removeprefix("!").removeprefix("**/")
        names = [*candidates, *parts] if "**/" in pattern else candidates
        if any(fnmatch.fnmatchcase(name, glob) for name in names):
            included = negated
    return included


def load_yaml(name: str) -> Any:
    return yaml.safe_load((DOCKER / name).read_text())


def strings(value: Any) -> list[str]:
    """Every string inside a YAML or JSON value, keys left out."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.values() for text in strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return []


def variables(text: str) -> dict[str, str]:
    """The ${NAME…} of a compose value → what follows the name (`:-default`, `:?message` or '').

    `$$` is an escaped dollar. Nested variables are listed too.
    """
    found: dict[str, str] = {}
    text = text.replace("$$", "")
    for match in re.finditer(r"\$\{(\w+)", text):
        depth, end = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        found[match[1]] = text[match.end() : end - 1]
    return found


def interpolate(text: str, values: dict[str, str] | None = None) -> str:
    """What compose makes of a value: set variables, else their defaults; `$$` becomes `$`."""
    values = values or {}
    while match := re.search(r"(?<!\$)\$\{(\w+)(?::[-?]([^${}]*))?\}", text):
        text = text[: match.start()] + values.get(match[1], match[2] or "") + text[match.end() :]
    return text.replace("$$", "$")


def example_settings() -> dict[str, tuple[str, bool]]:
    """docker/.env.example: name → (value, whether the line is active)."""
    lines = (DOCKER / ".env.example").read_text().splitlines()
    matches = (re.fullmatch(r"(# )?([A-Z][A-Z0-9_]*)=(.*)", line) for line in lines)
    return {m[2]: (m[3], m[1] is None) for m in matches if m}


def seconds(duration: str) -> float:
    """A compose duration such as `45s`, `1m30s` or `500ms`."""
    parts = re.findall(r"(\d+)(ms|s|m|h)", duration)
    assert "".join(n + unit for n, unit in parts) == duration, duration
    return sum(int(n) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit] for n, unit in parts)
