"""Generation parameters: the task's defaults under the request's own, checked, then sampled with.

What one field's bounds cannot say is here: fields that contradict each other or the model.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from pydantic import ValidationError

from prefixd_server.errors import InvalidRequest
from prefixd_server.http.errors import invalid_request
from prefixd_server.http.schemas import Parameters
from prefixd_server.types import BeamParams, SamplingParams

__all__ = ["check_parameters", "is_greedy", "is_search", "merge_defaults", "sampling_params"]

Refuse = Callable[[str, str], NoReturn]


def merge_defaults(defaults: Mapping[str, Any], own: Parameters | None) -> Parameters:
    """``defaults`` is a task record's. Raises InvalidRequest where what was stored is not valid."""
    own = own or Parameters()
    if not defaults:
        return own
    given = own.model_dump(exclude_none=True)
    stored = dict(defaults.get("parameters") or {})
    if defaults.get("stop") and not stored.get("stop"):
        stored["stop"] = defaults["stop"]
    # do_sample and temperature are one switch: the request's half turns off the stored other half.
    if given.get("do_sample") is False:
        stored.pop("temperature", None)
    if "temperature" in given:
        stored.pop("do_sample", None)
    # So are searching and drawing: who asks for one does not want what the task keeps of the other.
    if is_search(own):
        stored = {name: value for name, value in stored.items() if name not in _DRAWING}
    elif own.num_beams == 1 or own.do_sample or own.temperature:
        stored = {name: value for name, value in stored.items() if name not in _SEARCHING}
    try:
        return Parameters.model_validate({**stored, **given})
    except ValidationError as error:
        subject = "the task's stored defaults are not valid: "
        raise invalid_request(error.errors(), "defaults.parameters", subject=subject) from None


def is_search(p: Parameters) -> bool:
    return p.num_beams is not None and p.num_beams > 1


def is_greedy(p: Parameters) -> bool:
    return p.temperature == 0 or (p.temperature is None and not p.do_sample)


def check_parameters(
    p: Parameters, *, vocab_size: int, stream: bool = False, at: str = "parameters"
) -> None:
    """Raise InvalidRequest, naming the field below ``at``, where fields contradict each other."""

    def refuse(field: str, message: str) -> NoReturn:
        raise InvalidRequest(f"{at}.{field}: {message}", param=f"{at}.{field}")

    n, best_of = p.n or 1, p.best_of or p.n or 1
    if p.do_sample is False and p.temperature:
        refuse("temperature", f"{p.temperature:g} samples, but do_sample is false")
    if p.do_sample and p.temperature == 0:
        refuse("temperature", "0 is greedy, but do_sample is true")
    if p.min_new_tokens is not None and p.min_new_tokens > (p.max_new_tokens or 100):
        refuse(
            "min_new_tokens",
            f"{p.min_new_tokens} is over max_new_tokens, {p.max_new_tokens or 100}",
        )
    if best_of < n:
        refuse("best_of", f"{best_of} is below n, {n}")
    if is_search(p):
        _check_search(p, stream, refuse)
    else:
        for name in ("length_penalty", "early_stopping"):
            if getattr(p, name) is not None:
                refuse(name, "needs num_beams above 1")
    if best_of > 1 and not is_search(p):
        field = "n" if n > 1 else "best_of"
        if stream:
            refuse(field, f"{best_of} sequences cannot be streamed")
        if is_greedy(p):
            refuse(field, f"{best_of} greedy sequences would be the same; sample to get others")
    if p.top_n_tokens and not p.details:
        refuse("top_n_tokens", "needs details")
    if p.decoder_input_details and not p.details:
        refuse("decoder_input_details", "needs details")
    if p.decoder_input_details and stream:
        refuse("decoder_input_details", "cannot be streamed")
    for token in p.stop_token_ids or ():
        if token >= vocab_size:
            refuse("stop_token_ids", f"{token} is no token of the model's {vocab_size}")
    for name in p.logit_bias or {}:
        if int(name) >= vocab_size:
            refuse("logit_bias", f"{name} is no token of the model's {vocab_size}")


def _check_search(p: Parameters, stream: bool, refuse: Refuse) -> None:
    """Refuse what a beam search would have to ignore."""
    if stream:
        refuse("num_beams", f"{p.num_beams} beams cannot be streamed: all end together")
    if p.n is not None and p.num_beams is not None and p.n > p.num_beams:
        refuse("n", f"{p.n} is over num_beams, {p.num_beams}")
    if p.stop:
        # transformers ends a hypothesis at its stop string while it searches; only tokens do here.
        refuse("stop", "does not go with num_beams: use stop_token_ids")
    for name, off in _DRAWING.items():
        value = getattr(p, name)
        if value is not None and value != off:
            refuse(name, f"{value} does not go with num_beams, {p.num_beams}")


def sampling_params(p: Parameters) -> SamplingParams:
    """Of checked parameters; draws the seed when none was given and the request samples."""
    greedy = is_greedy(p)
    temperature = 0.0 if greedy else (1.0 if p.temperature is None else p.temperature)
    seed = secrets.randbits(63) if p.seed is None else p.seed
    given: dict[str, Any] = p.model_dump(include=_SAME_NAME, exclude_none=True)
    return SamplingParams(
        **given,
        temperature=temperature,
        seed=0 if greedy else seed,
        logit_bias=tuple((int(token), bias) for token, bias in (p.logit_bias or {}).items()),
        stop_token_ids=frozenset(p.stop_token_ids or ()),
        prompt_logprobs=bool(p.decoder_input_details),
        beams=_beam_params(p) if is_search(p) else None,
    )


def _beam_params(p: Parameters) -> BeamParams:
    assert p.num_beams is not None
    return BeamParams(
        num_beams=p.num_beams,
        n=p.n or 1,
        length_penalty=1.0 if p.length_penalty is None else p.length_penalty,
        early_stopping=p.early_stopping or False,
    )


_DRAWING = {
    "do_sample": False,
    "temperature": 0,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "typical_p": 1,
    "best_of": 1,
    "top_n_tokens": 0,
}
"""what a search has no use for, each with the value that says nothing"""

_SEARCHING = ("num_beams", "length_penalty", "early_stopping")

_SAME_NAME = {
    "max_new_tokens",
    "min_new_tokens",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
    "top_n_tokens",
}
