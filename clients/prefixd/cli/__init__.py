"""The ``prefixd`` command.

Exit codes: 0, 1 for any failure (one line on stderr, never a traceback), 2 for wrong usage, 130 for
Ctrl-C. The environment is read here and nowhere else in the client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from prefixd import APIError, PrefixdError, __version__
from prefixd.cli import _convert, _evaluate, _generate, _prefixes, _server, _tasks, _train
from prefixd.cli._shared import error_line

__all__ = ["app", "main"]

app = typer.Typer(
    name="prefixd",
    help="Serve trained prefixes, and use a server of them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"prefixd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


for _commands in (_server, _train, _evaluate, _prefixes, _convert, _generate, _tasks):
    _commands.register(app)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv``); returns 1 on failure, else raises SystemExit."""
    try:
        app(args=args, prog_name="prefixd")
    except PrefixdError as error:
        error_line(_described(error))
    except ModuleNotFoundError as error:
        if not _server.missing_extra(error):
            raise
        error_line(f"{error.name} is not installed: pip install 'prefixd[server]'")
    except OSError as error:
        error_line(str(error))
    return 1


def _described(error: PrefixdError) -> str:
    if not isinstance(error, APIError):
        return str(error)
    context = [f"HTTP {error.status}"]
    context += [f"{error.param}"] if error.param and error.param not in error.message else []
    context += [f"request {error.request_id}"] if error.request_id else []
    return f"{error.message} ({', '.join(context)})"
