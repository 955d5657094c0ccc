"""What clients get: the JSON of ``docs/api.md``, as models that also make the OpenAPI document."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from prefixd_server.types import PrefixState

__all__ = [
    "ErrorAnswer",
    "GenerateAnswer",
    "InfoAnswer",
    "StatusAnswer",
    "TaskAnswer",
    "TasksAnswer",
    "UploadAnswer",
    "VersionAnswer",
    "errors",
]

FinishWord = Literal["length", "eos_token", "stop_sequence"]

_TOKENS = (
    "P of the decoder; of a prefix without that site the encoder's, else the cross-attention's"
)
_Shape = Annotated[list[int], Field(min_length=4, max_length=4)]
_SITES = "site → [L, H_kv, P, D]; each site has its own P"


class ErrorDetail(BaseModel):
    message: str
    type: str
    code: str
    param: str | None = Field(description="the field at fault")


class ErrorAnswer(BaseModel):
    error: ErrorDetail


class TokenAnswer(BaseModel):
    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillAnswer(BaseModel):
    id: int
    text: str
    logprob: float | None = Field(description="null for the first where nothing is before it")


class DetailsAnswer(BaseModel):
    finish_reason: FinishWord
    generated_tokens: int
    seed: int | None = Field(description="null when greedy")
    prefill: list[PrefillAnswer]
    tokens: list[TokenAnswer]
    top_tokens: list[list[TokenAnswer]] | None


class SequenceAnswer(BaseModel):
    generated_text: str
    score: float | None = Field(description="of a beam search's hypothesis; else null")
    details: DetailsAnswer | None


class UsageAnswer(BaseModel):
    prompt_tokens: int
    completion_tokens: int = Field(description="of every sequence drawn")
    total_tokens: int
    prefix_tokens: int = Field(description="the prefix's num_virtual_tokens")


class GenerateAnswer(SequenceAnswer):
    sequences: list[SequenceAnswer] | None = Field(description="all of them when n > 1")
    task: str
    version: int | None
    usage: UsageAnswer


class UploadAnswer(BaseModel):
    task: str
    version: int
    sha256: str
    num_virtual_tokens: int = Field(description=_TOKENS)
    sites: dict[str, _Shape] = Field(description=_SITES)
    format: str
    bytes: int
    created_at: datetime
    active: bool


class VersionAnswer(BaseModel):
    task: str
    version: int
    sha256: str
    num_virtual_tokens: int = Field(description=_TOKENS)
    query_offset: int = Field(description="0, or P: each stream begins behind its own prefix")
    sites: dict[str, _Shape] = Field(description=_SITES)
    dtype: str
    format: str
    bytes: int
    base_fingerprint: str | None
    base_model: str | None
    verified: bool = Field(description="names this server's base model by fingerprint")
    provenance: dict[str, Any]
    created_at: datetime
    weight: float = Field(description="its share of the traffic")
    residency: PrefixState = Field(description="on the server that answers")


class TaskAnswer(BaseModel):
    task: str
    description: str
    pinned: bool
    defaults: dict[str, Any]
    active: int | None
    split: dict[str, float]
    versions: list[VersionAnswer]
    requests_running: int = Field(description="on the server that answers")
    created_at: datetime
    updated_at: datetime


class TasksAnswer(BaseModel):
    tasks: list[TaskAnswer]
    next_cursor: str | None


class StatusAnswer(BaseModel):
    status: Literal["ok", "ready", "draining", "store_unavailable", "engine_dead"]


class EncoderAnswer(BaseModel):
    num_layers: int
    num_kv_heads: int
    head_dim: int


class ModelAnswer(BaseModel):
    name: str
    fingerprint: str | None
    architecture: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    encoder: EncoderAnswer | None = Field(description="null for a decoder-only model")
    max_model_len: int
    dtype: str
    device: str


class LimitsAnswer(BaseModel):
    max_body_bytes: int
    max_upload_bytes: int
    max_virtual_tokens: int = Field(description="at each site")
    max_tasks_per_tenant: int
    max_versions_per_task: int
    max_num_seqs: int
    max_queue: int
    request_timeout_s: float


class CacheAnswer(BaseModel):
    page_size: int
    num_pages: int
    free_pages: int


class InfoAnswer(BaseModel):
    version: str
    model: ModelAnswer
    limits: LimitsAnswer
    cache: CacheAnswer

    model_config = ConfigDict(protected_namespaces=())


_EXAMPLES: dict[int, tuple[str, str, str, str, str | None]] = {
    400: (
        "Malformed body, or the prompt is too long for the model",
        "malformed JSON: unexpected end of data",
        "invalid_request_error",
        "malformed_body",
        "body",
    ),
    404: (
        "Task or version unknown",
        "task 'e2e' does not exist",
        "not_found_error",
        "not_found",
        "task",
    ),
    409: (
        "If-Match failed, or the version still takes traffic",
        "task 'e2e' is at another revision",
        "conflict_error",
        "conflict",
        None,
    ),
    413: (
        "Body over the limit",
        "body of over 4194304 bytes",
        "invalid_request_error",
        "too_large",
        "body",
    ),
    415: (
        "Wrong content type",
        "content type 'text/plain'; expected application/json",
        "invalid_request_error",
        "unsupported_media_type",
        None,
    ),
    422: (
        "Invalid value, or a prefix that is damaged or does not fit the model",
        "parameters.top_p: Input should be less than or equal to 1, got 2",
        "invalid_request_error",
        "invalid_value",
        "parameters.top_p",
    ),
    429: (
        "The queue is full",
        "1024 sequences are waiting and the queue holds 1024",
        "overloaded_error",
        "queue_full",
        None,
    ),
    503: (
        "Draining, or the store, the engine or the prefix is unavailable",
        "the server is shutting down",
        "unavailable_error",
        "draining",
        None,
    ),
    504: (
        "The deadline passed",
        "not finished within 600 s",
        "timeout_error",
        "deadline_exceeded",
        None,
    ),
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route that may answer with these failures."""
    return {status: _documented(status) for status in statuses}


def _documented(status: int) -> dict[str, Any]:
    description, message, type_, code, param = _EXAMPLES[status]
    example = {"error": {"message": message, "type": type_, "code": code, "param": param}}
    answer: dict[str, Any] = {
        "model": ErrorAnswer,
        "description": description,
        "content": {"application/json": {"example": example}},
    }
    if status in (429, 503):
        seconds = {"description": "seconds to wait", "schema": {"type": "integer"}}
        answer["headers"] = {"Retry-After": seconds}
    return answer
