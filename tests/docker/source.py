"""What the server's source says it has: its routes and its metrics, read without importing it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.docker.files import ROOT

SERVER = ROOT / "server" / "prefixd_server"
METHODS = frozenset({"get", "post", "put", "patch", "delete"})
METRIC = re.compile(r"(vllm:|prefixd_)[a-z0-9_]+")


def _trees(paths: Iterator[Path]) -> Iterator[ast.AST]:
    return (ast.parse(path.read_text()) for path in paths)


def routes() -> set[tuple[str, str]]:
    """(method, path) of every route decorator (`@router.get("/livez")`) under http/."""
    found = set()
    for tree in _trees(SERVER.glob("http/**/*.py")):
        for node in ast.walk(tree):
            for decorator in getattr(node, "decorator_list", []):
                match decorator:
                    case ast.Call(
                        func=ast.Attribute(attr=method), args=[ast.Constant(value=str(path)), *_]
                    ) if method in METHODS:
                        found.add((method.upper(), path))
    return found


def metric_words() -> set[str]:
    """Every string in the server's metrics modules: the names of metrics and of their labels."""
    return {
        node.value
        for tree in _trees(SERVER.rglob("metrics*.py"))
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def metrics() -> set[str]:
    """Every metric's name, as it is written in the server's metrics modules."""
    return {word for word in metric_words() if METRIC.fullmatch(word)}
