"""The rooms and who may know whom: the design's import table, enforced on the source itself."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "prefixd_server": ROOT / "server" / "prefixd_server",
    "prefixd_store": ROOT / "prefix_store" / "prefixd_store",
    "prefixd": ROOT / "clients" / "prefixd",
    "prefixd_train": ROOT / "clients" / "prefixd_train",
}
MAX_LINES = 400
OPTIONAL = ("triton",)
"""libraries that are not installed everywhere, each imported by modules of its own"""


class Room(NamedTuple):
    """``may``: modules of ours it may import besides its own. ``never``: libraries it may not know.

    A name stands for itself and all below it. Imports inside functions and for types count too.
    """

    may: tuple[str, ...] = ()
    never: tuple[str, ...] = ()


LEAVES = ("prefixd_server.types", "prefixd_server.errors", "prefixd_server.config")
WEB = ("fastapi", "starlette", "uvicorn", "httpx", "prometheus_client")
MODELS = ("torch", "transformers", "tokenizers")
SERVING = ("fastapi", "starlette", "uvicorn", "redis", "transformers", "tokenizers")

# A module belongs to the room with the longest name that fits.
ROOMS = {
    "prefixd_server.types": Room(("prefixd_server.errors",), (*MODELS, "redis", *WEB)),
    # The root of the exception tree is the store's: it must not know the server, and one table
    # maps every exception to HTTP.
    "prefixd_server.errors": Room(("prefixd_store.errors",), (*MODELS, "redis", *WEB)),
    "prefixd_server.config": Room((), (*MODELS, "redis", *WEB)),
    "prefixd_server.kv": Room(LEAVES, ("transformers", "tokenizers", "redis", *WEB)),
    # Compiled code as functions of tensors: of no room's words.
    "prefixd_server.native": Room((), ("transformers", "tokenizers", "redis", *WEB)),
    "prefixd_server.attention": Room(
        (*LEAVES, "prefixd_server.kv", "prefixd_server.native"), ("redis", *WEB)
    ),
    "prefixd_server.models": Room(
        (
            *LEAVES,
            "prefixd_server.attention",
            "prefixd_server.kv.pool",  # its dtypes, and pages to try a program on
            "prefixd_server.native",
            # What a model is, in the words in which the prefix format names it.
            "prefixd_store.geometry",
            "prefixd_store.fingerprint",
            "prefixd_store.errors",
        ),
        ("redis", *WEB),
    ),
    "prefixd_server.prefix": Room(
        (*LEAVES, "prefixd_server.kv.allocator", "prefixd_store"), (*MODELS, "redis", *WEB)
    ),
    "prefixd_server.engine": Room(
        (
            *LEAVES,
            "prefixd_server.kv",
            "prefixd_server.attention",
            "prefixd_server.models",
            "prefixd_server.native",
            "prefixd_server.prefix",
            "prefixd_store",
        ),
        ("transformers", "tokenizers", "redis", *WEB),
    ),
    "prefixd_server.frontend": Room(
        (*LEAVES, "prefixd_server.engine.mailbox"), ("torch", "redis", *WEB)
    ),
    "prefixd_server.http": Room(
        (*LEAVES, "prefixd_server.frontend", "prefixd_server.prefix.registry", "prefixd_store"),
        (*MODELS, "redis"),
    ),
    # These join the rooms.
    "prefixd_server.wiring": Room(("prefixd_server", "prefixd_store")),
    "prefixd_server.cli": Room(("prefixd_server", "prefixd_store")),
    "prefixd_server.demo": Room(("prefixd_server", "prefixd_store", "prefixd")),
    "prefixd_server.cluster": Room(),
    "prefixd_server": Room(),
    "prefixd_store": Room((), (*MODELS, *WEB)),
    "prefixd": Room(("prefixd",), (*SERVING, "torch")),
    # Makes safetensors of pickles, where torch is installed.
    "prefixd._pickles": Room(("prefixd",), SERVING),
    # Writes the store's format, with the store's own importers.
    "prefixd.cli._convert": Room(("prefixd", "prefixd_store"), (*SERVING, "torch")),
    # Adds `serve` and `demo` to the command, where the server is installed.
    "prefixd.cli._server": Room(("prefixd", "prefixd_server.cli"), (*SERVING, "torch")),
    # Trains a prefix, where the trainer's extra is installed; its settings need no torch.
    "prefixd.cli._train": Room(("prefixd", "prefixd_train"), (*SERVING, "torch")),
    # Scores a task, where the trainer's extra is installed.
    "prefixd.cli._evaluate": Room(("prefixd", "prefixd_train"), (*SERVING, "torch")),
    "prefixd_train": Room(("prefixd", "prefixd_store"), ("fastapi", "redis")),
}


class Import(NamedTuple):
    module: str
    line: int
    lazy: bool
    """inside a function, or for types only"""


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def within(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def room_of(module: str) -> str:
    return max((name for name in ROOMS if within(module, name)), key=len)


def imports(source: str) -> list[Import]:
    return list(_imports(ast.parse(source), lazy=False))


def _imports(node: ast.AST, *, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield from (Import(name, child.lineno, lazy) for name in _targets(child))
        yield from _imports(child, lazy=lazy or _postpones(child))


def _postpones(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def _targets(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, "imports are absolute here"
    assert node.module is not None
    # `from package import submodule` knows the submodule; any other name is the module's own.
    names = [f"{node.module}.{alias.name}" for alias in node.names]
    return sorted({name if name in modules() else node.module for name in names})


def violations(module: str, source: str) -> list[str]:
    room = room_of(module)
    may, never = ROOMS[room]
    found = []
    for name, line, _ in imports(source):
        if name.partition(".")[0] in PACKAGES:
            fine = room_of(name) == room or any(within(name, other) for other in may)
        else:
            fine = not any(within(name, library) for library in never)
        if not fine:
            found.append(f"{module}:{line} imports {name}, which {room} must not know")
    return found


def test_each_room_imports_only_what_its_row_allows() -> None:
    found = [
        line for name, path in modules().items() for line in violations(name, path.read_text())
    ]
    assert not found, "\n".join(found)


def test_every_row_is_of_a_room_that_exists() -> None:
    assert set(ROOMS) <= set(modules())
    allowed = {name for room in ROOMS.values() for name in room.may}
    assert allowed <= set(modules())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("prefixd_server.http.native", "import torch"),
        ("prefixd_server.http.native", "def f():\n    from torch import nn"),
        ("prefixd_server.http.native", "if TYPE_CHECKING:\n    import prefixd_server.kv.pool"),
        ("prefixd_server.http.native", "from prefixd_server import types, kv"),
        ("prefixd_server.frontend.text", "from prefixd_server.engine.engine import Engine"),
        ("prefixd_server.types", "from prefixd_server.config import Config"),
        ("prefixd_server.kv.allocator", "from prefixd_server.attention import sdpa"),
        ("prefixd_store.format", "import prefixd_server"),
        ("prefixd.cli._tasks", "from prefixd_server.cli import register"),
        ("prefixd._client", "import torch.nn"),
    ],
)
def test_a_violation_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


def test_the_client_imports_torch_only_when_it_converts_a_pickle() -> None:
    eager = [
        f"{name}:{item.line}"
        for name, path in modules().items()
        if within(name, "prefixd")
        for item in imports(path.read_text())
        if within(item.module, "torch") and not item.lazy
    ]
    assert not eager


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("prefixd", ("torch", "fastapi", "redis", "transformers", "prefixd_server")),
        ("prefixd.cli", ("torch", "fastapi", "redis", "transformers")),
        ("prefixd_store", ("torch", "fastapi", "redis", "transformers", "prefixd_server")),
        ("prefixd_server.http.app", ("torch", "redis", "transformers")),
    ],
)
def test_importing_stays_light(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*(m for m in {absent} if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout.split()) == (0, []), run.stderr


def test_files_are_short() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


@pytest.mark.parametrize("module", sorted(modules()))
def test_what_a_module_exports_exists(module: str) -> None:
    tree = ast.parse(modules()[module].read_text())
    if not any(_assigns_all(statement) for statement in tree.body):
        return
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    names = list(loaded.__all__)
    assert [name for name in names if not hasattr(loaded, name)] == []
    assert len(set(names)) == len(names)


def _assigns_all(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__"


def test_the_environment_is_read_only_by_the_commands() -> None:
    """And there by typer: code that reads it elsewhere has settings that no --help shows.

    Compiling is no setting of a server: an image's build does it before there is one.
    """
    readers = {
        name
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute | ast.Name | ast.alias) and _reads_environment(node)
    }
    assert readers <= {"prefixd_server.cli", "prefixd_server.native.build"}


def _reads_environment(node: ast.Attribute | ast.Name | ast.alias) -> bool:
    if isinstance(node, ast.Attribute):
        name = node.attr
    else:
        name = node.id if isinstance(node, ast.Name) else node.name
    return name in {"environ", "environb", "getenv", "getenvb"}


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    homes = ("/" + "work/", "/" + "root/", "/" + "home/")
    found = [
        f"{name}: {home}"
        for name in listed.stdout.splitlines()
        for home in homes
        if (ROOT / name).is_file() and home in (ROOT / name).read_text(errors="replace")
    ]
    assert not found
