"""What the server answers. Fields that a newer server adds are ignored."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "CacheInfo",
    "Details",
    "EncoderInfo",
    "Generation",
    "Health",
    "ModelInfo",
    "Parameters",
    "Sequence",
    "ServerInfo",
    "StreamDetails",
    "StreamEvent",
    "Task",
    "TaskPage",
    "Token",
    "UploadResult",
    "Usage",
    "Version",
]


class Parameters(TypedDict, total=False):
    """Generation parameters; one left out or None takes the task's default, then the server's."""

    max_new_tokens: int | None
    min_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: dict[int, float] | None
    seed: int | None
    stop: list[str] | None
    stop_token_ids: list[int] | None
    ignore_eos: bool | None
    n: int | None
    best_of: int | None
    num_beams: int | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    return_full_text: bool | None
    truncate: int | None
    details: bool | None
    decoder_input_details: bool | None
    top_n_tokens: int | None
    timeout_s: float | None
    priority: int | None


class _Answer(BaseModel):
    # "model_" is a prefix that pydantic reserves and the server uses.
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Token(_Answer):
    id: int
    text: str
    logprob: float | None = None
    """Of the model's own distribution, before temperature, penalties and filters."""
    special: bool = False


class Usage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prefix_tokens: int = 0


class Details(_Answer):
    finish_reason: str
    """``length``, ``eos_token`` or ``stop_sequence``"""
    generated_tokens: int
    seed: int | None = None
    prefill: list[Token] = []
    tokens: list[Token] = []
    top_tokens: list[list[Token]] | None = None


class Sequence(_Answer):
    generated_text: str
    score: float | None = None
    """Of a beam search: the summed log-probability over length ** ``length_penalty``."""
    details: Details | None = None


class Generation(_Answer):
    generated_text: str
    score: float | None = None
    details: Details | None = None
    sequences: list[Sequence] | None = None
    """All ``n`` of them, where more than one was asked for."""
    task: str
    version: int | None = None
    """The one version that made this text; None for the base model."""
    usage: Usage


class StreamDetails(_Answer):
    finish_reason: str
    generated_tokens: int
    input_length: int | None = None
    seed: int | None = None


class StreamEvent(_Answer):
    """One token. On the last event ``final`` is true and the fields below ``token`` are set."""

    index: int = 0
    token: Token
    top_tokens: list[Token] | None = None
    generated_text: str | None = None
    details: StreamDetails | None = None
    task: str | None = None
    version: int | None = None
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """May be empty while a character or a possible stop string is incomplete."""
        return self.token.text

    @property
    def final(self) -> bool:
        return self.generated_text is not None


class _Stored(_Answer):
    task: str
    version: int
    sha256: str
    num_virtual_tokens: int
    """The decoder's; of a prefix without that site the encoder's, else the cross-attention's."""
    sites: dict[str, list[int]] = {}
    """site → ``[L, H_kv, P, D]`` of its key (and value) tensor"""

    @property
    def lengths(self) -> dict[str, int]:
        """site → P"""
        return {site: shape[2] for site, shape in self.sites.items()}


class Version(_Stored):
    query_offset: int
    dtype: str
    format: str
    bytes: int
    base_fingerprint: str | None = None
    base_model: str | None = None
    verified: bool = False
    """The prefix names this server's base model by fingerprint."""
    provenance: dict[str, Any] = {}
    created_at: datetime
    weight: float = 0.0
    """Its share of the task's traffic, 0 … 1."""
    residency: str = "stored"


class Task(_Answer):
    task: str
    description: str = ""
    pinned: bool = False
    defaults: dict[str, Any] = {}
    active: int | None = None
    split: dict[int, float] = {}
    versions: list[Version] = []
    requests_running: int = 0
    created_at: datetime
    updated_at: datetime
    etag: str | None = None
    """Give it as ``if_match`` to change the task only if nobody else has. None in listings."""


class TaskPage(_Answer):
    tasks: list[Task]
    next_cursor: str | None = None


class UploadResult(_Stored):
    format: str
    bytes: int
    created_at: datetime
    active: bool
    created: bool = True
    """False where these bytes already were a version of the task."""


class EncoderInfo(_Answer):
    num_layers: int
    num_kv_heads: int
    head_dim: int


class ModelInfo(_Answer):
    name: str
    fingerprint: str | None = None
    architecture: str | None = None
    num_layers: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    encoder: EncoderInfo | None = None
    """None for a decoder-only model."""
    max_model_len: int | None = None
    dtype: str | None = None
    device: str | None = None


class CacheInfo(_Answer):
    page_size: int
    num_pages: int
    free_pages: int


class ServerInfo(_Answer):
    version: str
    model: ModelInfo
    limits: dict[str, Any] = Field(default_factory=dict)
    cache: CacheInfo | None = None


class Health(_Answer):
    status: str
    """``ok``, ``ready``, ``draining``, ``store_unavailable`` or ``engine_dead``"""

    @property
    def ok(self) -> bool:
        return self.status in ("ok", "ready")
