"""``prefixd serve`` and ``prefixd demo``. Options, environment and config file are config.py's.

The environment is read here and nowhere else. torch and the rooms are imported when a command runs,
so that ``prefixd --help`` stays fast.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import logging
import os
import platform
import signal
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from prefixd_server.config import Config
from prefixd_server.errors import PrefixdError

if TYPE_CHECKING:
    from prefixd_server.wiring import Server

__all__ = ["load_config", "register", "serve"]

log = logging.getLogger(__name__)


def register(app: typer.Typer) -> None:
    """Add the server's commands to the ``prefixd`` command."""
    app.command("serve", help="Serve one frozen model and all prefixes of a store.")(
        _with_settings(_serve_command)
    )
    app.command("demo", help="Serve the demo model with four ready tasks.")(
        _with_settings(_demo_command)
    )


def _serve_command(config: Config) -> None:
    serve(config)


def _demo_command(config: Config) -> None:
    import prefixd_server.demo as demo

    serve(config, on_ready=demo.prepare)


def serve(config: Config, *, on_ready: Callable[[str], None] = lambda url: None) -> None:
    """Load, listen, serve until a signal, drain. ``on_ready`` gets the server's URL."""
    from prefixd_server.http.app import create_app
    from prefixd_server.http.logging import setup_logging
    from prefixd_server.http.server import bind
    from prefixd_server.http.server import serve as serve_http

    setup_logging(config.http.log_format, config.http.log_level)
    try:
        listener = bind(config.http)
    except OSError as error:
        reason = str(error.strerror).split(" (")[0]  # socket adds the address once more
        _fail(f"cannot listen on {config.http.host}:{config.http.port}: {reason}")
    died = False

    def on_death() -> None:
        nonlocal died
        died = True
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        server = _start(config, on_death)
    except PrefixdError as error:
        _fail(str(error))
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def ready() -> None:
        freeze_heap()
        log.info("serving %s at %s", server.model.name, url)
        on_ready(url)

    try:
        serve_http(
            create_app(server.services),
            server.services,
            listener,
            on_drain=server.drain,
            on_ready=ready,
        )
    finally:
        server.close()
    if died:
        # Whoever supervises the process restarts it: an engine does not come back by itself.
        sys.exit(1)


def freeze_heap() -> None:
    """Keep the collector of reference cycles away from what the process has loaded.

    A full collection looks at each object of torch, transformers and the model, and everything
    waits: 0.3 s with the demo model, once in some thousands of tokens. What is made later is still
    collected, in larger portions, as most of it lives for a token or a request. What loading has
    freed goes back to the system: glibc would keep it, 200 MB with the demo model.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _start(config: Config, on_death: Callable[[], None]) -> Server:
    from prefixd_server.wiring import Server

    server = Server(config, on_death=on_death)
    try:
        server.start()
    except PrefixdError:
        server.close()
        raise
    return server


def load_config(path: Path | None, options: dict[str, Any]) -> Config:
    """Options (and environment) over the file's keys over the defaults. Raises ValueError."""
    values: dict[str, Any] = {}
    if path is not None:
        values = tomllib.loads(path.read_text())
    values |= {name: value for name, value in options.items() if value is not None}
    sections: dict[str, dict[str, Any]] = {}
    homes = {name: section for section, name, _ in _settings()}
    for name, value in values.items():
        if name not in homes:
            raise ValueError(f"{path}: unknown setting {name!r}")
        sections.setdefault(homes[name], {})[name] = value
    return Config.model_validate(sections)


def _settings() -> list[tuple[str, str, FieldInfo]]:
    """(section, field, info) of every setting."""
    found = []
    for section, info in Config.model_fields.items():
        model = info.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        found += [(section, name, field) for name, field in model.model_fields.items()]
    return found


def _with_settings(run: Callable[[Config], None]) -> Callable[..., None]:
    """A command with one option for each setting, which calls ``run`` with the validated whole."""

    def command(config_file: Path | None = None, **options: Any) -> None:
        try:
            config = load_config(config_file, options)
        except ValidationError as error:
            _fail("; ".join(_complaint(item) for item in error.errors()), code=2)
        except (OSError, ValueError) as error:
            _fail(str(error), code=2)
        run(config)

    parameters = [
        inspect.Parameter(
            "config_file",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None,
                typer.Option(
                    "--config", envvar="PREFIXD_CONFIG", help="TOML file: setting = value"
                ),
            ],
        )
    ]
    parameters += [_option(section, name, field) for section, name, field in _settings()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _option(section: str, name: str, field: FieldInfo) -> inspect.Parameter:
    default = field.get_default()
    flag = name.replace("_", "-")
    option = typer.Option(
        f"--{flag}/--no-{flag}" if isinstance(default, bool) else f"--{flag}",
        envvar=f"PREFIXD_{name.upper()}",
        help=field.description,
        show_default=False if default is None else str(default),
        rich_help_panel=section.capitalize(),
    )
    # None means "not given": a config file's value, or else the default, holds.
    kind: Any = field.annotation
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _complaint(item: Any) -> str:
    return f"{item['loc'][-1]}: {item['msg']} (got {item['input']!r})"


def _fail(message: str, code: int = 1) -> Any:
    typer.secho(message, fg="red", err=True)
    raise typer.Exit(code)
