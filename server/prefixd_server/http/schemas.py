"""What clients may send: strict types, unknown fields refused, bounds as in ``docs/api.md``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator
from pydantic.config import JsonDict

from prefixd_store.records import NAME_PATTERN

__all__ = [
    "TASK_REFERENCE_PATTERN",
    "ActivateRequest",
    "CompileRequest",
    "Defaults",
    "GenerateRequest",
    "PageSize",
    "Parameters",
    "PatchRequest",
    "QueryBool",
    "VersionNumber",
]

TASK_REFERENCE_PATTERN = NAME_PATTERN.removesuffix("$") + r"(@[1-9][0-9]{0,8})?$"
MAX_SEED = 2**63 - 1
_MAX_INT = 2**31 - 1
_NULL: JsonDict = {"type": "null"}

NotImplementedYet = Annotated[None, Field(description="not implemented: refused unless null")]


def _no_number(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("Input should be true, false or 'never'")  # to Python 1 is true
    return value


# One Literal and not a union, whose errors would name a branch behind the field.
EarlyStopping = Annotated[Literal[True, False, "never"], BeforeValidator(_no_number)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _opt(description: str, **bounds: Any) -> Any:
    return Field(None, description=description, **bounds)


class Parameters(_Body):
    """Generation parameters. null is the same as leaving the field out."""

    max_new_tokens: int | None = _opt("default 100", ge=1, le=_MAX_INT)
    min_new_tokens: int | None = _opt("no end of sequence before", ge=0, le=_MAX_INT)
    do_sample: bool | None = _opt("greedy unless true or a temperature is given")
    temperature: float | None = _opt("default 1.0; 0 means greedy", ge=0, le=100)
    top_k: int | None = _opt("keep the k most likely; 0: off", ge=0, le=_MAX_INT)
    top_p: float | None = _opt("nucleus", gt=0, le=1)
    min_p: float | None = _opt("least probability, relative to the largest", ge=0, le=1)
    typical_p: float | None = _opt("locally typical sampling", gt=0, le=1)
    repetition_penalty: float | None = _opt("over prompt and output; 1: off", gt=0, le=100)
    presence_penalty: float | None = _opt("over the output, as OpenAI", ge=-2, le=2)
    frequency_penalty: float | None = _opt("over the output, as OpenAI", ge=-2, le=2)
    logit_bias: (
        dict[
            Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")],
            Annotated[float, Field(ge=-100, le=100)],
        ]
        | None
    ) = _opt("token id → added to its logit", examples=[{"42": -100}])
    seed: int | None = _opt("default: drawn, and told in details", ge=0, le=MAX_SEED)
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] | None = _opt(
        "the text ends before the first one found", max_length=16
    )
    stop_token_ids: list[Annotated[int, Field(ge=0, le=_MAX_INT)]] | None = _opt(
        "generation ends with any of these", max_length=64
    )
    ignore_eos: bool | None = _opt("go on past the end of sequence")
    n: int | None = _opt("sequences to return", ge=1, le=16)
    best_of: int | None = _opt("sequences to draw; default n", ge=1, le=16)
    num_beams: int | None = _opt("search with so many beams; 1: off", ge=1, le=16)
    length_penalty: float | None = _opt(
        "score = log-probability / length ** this; default 1", ge=-10, le=10
    )
    early_stopping: EarlyStopping | None = _opt(
        "end a search at num_beams finished hypotheses; default false"
    )
    return_full_text: bool | None = _opt("put the prompt in front of the text")
    truncate: int | None = _opt("keep only the last so many prompt tokens", ge=1, le=_MAX_INT)
    details: bool | None = _opt("tokens with ids and log-probabilities")
    decoder_input_details: bool | None = _opt("the prompt's too, in details.prefill")
    top_n_tokens: int | None = _opt("alternatives at each position", ge=0, le=20)
    timeout_s: float | None = _opt("504 after so long", gt=0, le=86400)
    priority: int | None = _opt("lower runs first", ge=-100, le=100)
    grammar: NotImplementedYet = None
    # Clients of text-generation-inference send these whether they are used or not.
    adapter_id: NotImplementedYet = None
    watermark: Literal[False] | None = _opt("not implemented: refused unless null or false")


class GenerateRequest(_Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "inputs": "name : Blue Spice | Type : coffee shop",
                    "parameters": {"max_new_tokens": 48},
                    "stream": False,
                }
            ]
        }
    )

    inputs: str = Field(min_length=1, description="the prompt")
    parameters: Parameters | None = None
    stream: bool | None = Field(
        None, description="answer with server-sent events, one a token; null: false"
    )


class ActivateRequest(_Body):
    """Exactly one of ``version`` and ``split``."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [one], "properties": {one: {"not": _NULL}, other: _NULL}}
                for one, other in (("version", "split"), ("split", "version"))
            ],
            "examples": [{"version": 3}, {"split": {"3": 0.9, "4": 0.1}}],
        }
    )

    version: int | None = Field(None, ge=1, le=10**9 - 1)
    split: (
        dict[
            Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")],
            Annotated[float, Field(gt=0, le=1)],
        ]
        | None
    ) = Field(None, min_length=1, max_length=16, description="version → weight; they sum to 1")

    @model_validator(mode="after")
    def _exactly_one(self) -> ActivateRequest:
        if (self.version is None) == (self.split is None):
            raise ValueError("give exactly one of version and split")
        if self.split is not None and abs(sum(self.split.values()) - 1) > 1e-6:
            raise ValueError(f"the weights of split sum to {sum(self.split.values()):g}, not 1")
        return self

    def weights(self) -> dict[int, float]:
        if self.split is None:
            assert self.version is not None
            return {self.version: 1.0}
        return {int(version): weight for version, weight in self.split.items()}


class CompileRequest(_Body):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"text": "You answer in one short sentence."}]}
    )

    text: str = Field(min_length=1, description="what the prefix is to hold")


class Defaults(_Body):
    """What a request of the task leaves out."""

    parameters: Parameters | None = None
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] | None = Field(
        default=None, max_length=16
    )
    chat_template: Literal["model"] | None = Field(
        default=None,
        description="`model`: `inputs` is a user's message, put through the model's own template",
    )


class PatchRequest(_Body):
    model_config = ConfigDict(
        json_schema_extra={
            "minProperties": 1,
            "examples": [{"pinned": True, "defaults": {"stop": ["\n"]}}],
        }
    )

    description: str = Field("", max_length=4096)
    pinned: bool = Field(False, description="keep the prefix on the device")
    defaults: Defaults = Field(Defaults(), description="replaced as a whole")

    @model_validator(mode="after")
    def _something(self) -> PatchRequest:
        if not self.model_fields_set:
            raise ValueError("give at least one of description, pinned and defaults")
        return self

    def changes(self) -> dict[str, Any]:
        return self.model_dump(include=self.model_fields_set, exclude_none=True)


def _exact_bool(text: object) -> object:
    return {"true": True, "false": False}.get(text, text) if isinstance(text, str) else text


def _exact_int(text: object) -> object:
    if not isinstance(text, str):
        return text
    canonical = text.isascii() and text.isdigit() and len(text) <= 18
    return int(text) if canonical and str(int(text)) == text else text


# Pydantic also takes "yes", "on", "1.0" and " 1" from a URL: here there is one spelling of a value.
# Bounds stand before the validator: after it, they would be missing from the OpenAPI document.
QueryBool = Annotated[bool, Strict(), BeforeValidator(_exact_bool)]
PageSize = Annotated[int, Strict(), Ge(1), Le(1000), BeforeValidator(_exact_int)]
VersionNumber = Annotated[int, Strict(), Ge(1), Le(10**9 - 1), BeforeValidator(_exact_int)]
