"""Generation parameters: the task's defaults under the request's own, checked, then sampled with.

What one field's bounds cannot say is here: fields that contradict each other or the model.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from prefixd_server.errors import InvalidRequest
from prefixd_server.http.errors import invalid_request
from prefixd_server.http.schemas import Parameters
from prefixd_server.types import SamplingParams

__all__ = ["check_parameters", "is_greedy", "merge_defaults", "sampling_params"]


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
    try:
        return Parameters.model_validate({**stored, **given})
    except ValidationError as error:
        subject = "the task's stored defaults are not valid: "
        raise invalid_request(error.errors(), "defaults.parameters", subject=subject) from None


def is_greedy(p: Parameters) -> bool:
    return p.temperature == 0 or (p.temperature is None and not p.do_sample)


def check_parameters(
    p: Parameters, *, vocab_size: int, stream: bool = False, at: str = "parameters"
) -> None:
    """Raise InvalidRequest, naming the field below ``at``, where fields contradict each other."""

    def refuse(field: str, message: str) -> None:
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
    if best_of > 1:
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
    )


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
