"""serve and demo: the server package adds them where it is installed, else they say how to."""

from __future__ import annotations

import typer

from prefixd.cli._shared import error_line

__all__ = ["missing_extra", "register"]

# Ours: if one of these is missing something is broken, and installing an extra will not mend it.
_OWN = ("prefixd", "prefixd_store", "prefixd_server")
_ABSENT = ("prefixd_server", "prefixd_server.cli")


def register(app: typer.Typer) -> None:
    try:
        from prefixd_server.cli import register as register_server
    except ModuleNotFoundError as error:
        if not missing_extra(error):
            raise
        _register_placeholders(app)
        return
    register_server(app)


def missing_extra(error: ModuleNotFoundError) -> bool:
    """Whether an install of ``prefixd[server]`` would mend this import."""
    name = error.name or ""
    return name in _ABSENT or name.partition(".")[0] not in _OWN


def _register_placeholders(app: typer.Typer) -> None:
    for name, what in {
        "serve": "Serve a model and its prefixes.",
        "demo": "Serve a small model with ready tasks.",
    }.items():
        app.command(
            name,
            help=f"{what} (Not installed.)",
            # Whatever options the real command takes, the answer is the same.
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        )(_not_installed)


def _not_installed() -> None:
    error_line("the server is not installed: pip install 'prefixd[server]'")
    raise typer.Exit(1)
