"""prefixd generate."""

from __future__ import annotations

import json
from typing import Annotated, Any, cast

import typer

from prefixd import Client, Generation, Parameters, StreamEvent, Token
from prefixd._transport import DEFAULT_URL
from prefixd.cli._shared import (
    ApiKey,
    AsJson,
    Url,
    connect,
    for_terminal,
    print_json,
    read_text,
)
from prefixd.cli._table import Column, print_table

__all__ = ["register"]

# Arguments of Client.generate that --param must not reach.
_NOT_PARAMETERS = ("", "self", "task", "inputs", "version")


def generate(
    name: Annotated[str, typer.Argument(metavar="TASK[@V]", help="The task, or one version.")],
    prompt: Annotated[str, typer.Argument(help="The prompt, or - to read stdin.")],
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Print as it comes; default unless --json or --num-beams.",
        ),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sample; greedy without.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    num_beams: Annotated[
        int | None, typer.Option(help="Search with so many beams; not streamed.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text. Repeatable.")
    ] = None,
    details: Annotated[
        bool, typer.Option("--details", help="Tokens and log-probabilities.")
    ] = False,
    param: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=JSON", help="Any other parameter. Repeatable."),
    ] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Generate text for a prompt with the prefix of TASK.

    --json prints the whole answer; with --stream too, one JSON line an event.
    """
    named = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "num_beams": num_beams,
        "stop": stop or None,
        "details": details or None,
    }
    # The server checks names and values, so that an older client can use a newer parameter.
    parameters = cast(Parameters, named | _extra_parameters(param or []))
    text = read_text("-") if prompt == "-" else prompt
    searches = (parameters.get("num_beams") or 1) > 1
    streamed = not as_json and not searches if stream is None else stream
    with connect(url, api_key) as client:
        if streamed:
            _print_stream(client, name, text, parameters, as_json)
        else:
            _print_whole(client.generate(name, text, **parameters), as_json)


def register(app: typer.Typer) -> None:
    app.command()(generate)


def _extra_parameters(pairs: list[str]) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key in _NOT_PARAMETERS:
            raise typer.BadParameter(f"{key!r} is not a parameter", param_hint="--param")
        try:
            extra[key] = json.loads(value)
        except ValueError as error:
            raise typer.BadParameter(f"{pair!r} is not KEY=JSON", param_hint="--param") from error
    return extra


def _print_stream(
    client: Client, name: str, prompt: str, parameters: Parameters, as_json: bool
) -> None:
    tokens: list[Token] = []
    with client.stream(name, prompt, **parameters) as events:
        try:
            for event in events:
                tokens.append(event.token)
                _print_event(event, as_json)
        finally:
            if tokens and not as_json:
                print(flush=True)  # also where it broke: the error gets its own line
    if parameters.get("details") and not as_json:
        _print_tokens(tokens)


def _print_event(event: StreamEvent, as_json: bool) -> None:
    if as_json:
        print_json(event)
    else:
        print(for_terminal(event.text), end="", flush=True)


def _print_whole(generation: Generation, as_json: bool) -> None:
    if as_json:
        print_json(generation)
        return
    sequences = generation.sequences or []
    for text in [sequence.generated_text for sequence in sequences] or [generation.generated_text]:
        print(for_terminal(text), flush=True)
    if generation.details is not None:
        _print_tokens(generation.details.tokens)


def _print_tokens(tokens: list[Token]) -> None:
    print_table(
        [Column("id", right=True), Column("token"), Column("log-probability", right=True)],
        [
            [
                str(token.id),
                for_terminal(json.dumps(token.text, ensure_ascii=False)),
                "-" if token.logprob is None else f"{token.logprob:.4f}",
            ]
            for token in tokens
        ],
    )
