"""All settings, in one place: frozen sections, each field with its default and one line of help.

``prefixd serve`` makes its options, its environment variables (``PREFIXD_`` and the field's name in
capitals) and its config file's keys from these fields, so a setting is written once. Names are
unique over all sections.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["CacheConfig", "Config", "HttpConfig", "LimitsConfig", "ModelConfig", "SchedulerConfig"]

MiB = 1 << 20
GiB = 1 << 30


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Section):
    model: str = Field("demo", description="folder, hub id, or `demo` (SmolLM2-135M-Instruct)")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA if present")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto",
        description="auto: float32 on the CPU, bfloat16 on CUDA; int8: linear weights, CPU only",
    )
    max_model_len: int | None = Field(
        None, ge=8, description="longest prefix + prompt + output; default: the model's own"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads for torch; default: torch's")
    served_name: str | None = Field(None, description="name shown in /v1/info and in metrics")
    cache_dir: str = Field("~/.cache/prefixd", description="where the converted demo model is kept")
    attention: Literal["auto", "native", "triton", "sdpa"] = Field(
        "auto", description="attention backend; auto: native on the CPU, triton on CUDA, else sdpa"
    )
    pack_weights: bool = Field(
        True, description="lay the frozen weights out for the CPU once, at the start"
    )
    cuda_graphs: bool = Field(True, description="replay decode steps from CUDA graphs")


class CacheConfig(_Section):
    page_size: int = Field(16, ge=1, le=256, description="tokens in a KV page")
    kv_cache_bytes: int | None = Field(
        None, ge=1, description="KV pool; default: 1 GiB on the CPU, 80% of what is free on CUDA"
    )
    host_cache_bytes: int = Field(2 * GiB, ge=0, description="prefixes kept in host memory, LRU")
    max_device_prefixes: int = Field(4096, ge=1, description="prefixes kept in the KV pool, LRU")
    prompt_cache: bool = Field(
        True, description="compute prompts that begin alike once, within a tenant and prefix"
    )
    load_threads: int = Field(4, ge=1, le=64, description="prefix loads at the same time")
    load_retry_s: float = Field(
        1.0, ge=0, description="after a failed load, fail at once for so long before trying again"
    )


class SchedulerConfig(_Section):
    max_num_seqs: int = Field(128, ge=1, description="sequences in a batch")
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="tokens in a step, decodes first; default: 512, on CUDA 2048"
    )
    max_prefill_tokens: int | None = Field(
        None,
        ge=1,
        description="of prompts, in a step with decodes; more where several prompts wait for each "
        "decode; default: 128, on CUDA 512",
    )
    max_queue: int = Field(1024, ge=1, description="waiting sequences before 429")


class LimitsConfig(_Section):
    max_body_bytes: int = Field(4 * MiB, ge=1, description="largest JSON body")
    max_upload_bytes: int = Field(2 * GiB, ge=1, description="largest prefix upload")
    max_virtual_tokens: int = Field(65536, ge=1, description="longest prefix, at each site")
    max_tasks_per_tenant: int = Field(100_000, ge=1, description="tasks a tenant may have")
    max_versions_per_task: int = Field(1000, ge=1, description="versions a task may have")
    request_timeout_s: float = Field(600.0, gt=0, description="longest a request may take")
    load_timeout_s: float = Field(30.0, gt=0, description="longest a request waits for its prefix")
    store_timeout_s: float = Field(5.0, gt=0, description="longest a store call of HTTP may take")


class HttpConfig(_Section):
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port; 0 picks a free one")
    serve_base: bool = Field(True, description="serve the base model itself as task `base`")
    drain_timeout_s: float = Field(30.0, ge=0, description="SIGTERM: wait so long for requests")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: json if piped"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe"
    )
    metrics_max_tasks: int = Field(
        200, ge=0, description="tasks with metrics of their own; the rest count as `_other`"
    )


class StoreConfig(_Section):
    store: str = Field("prefixd-store", description="folder, or redis:// rediss:// URL")
    gc_interval_s: float = Field(300.0, gt=0, description="seconds between garbage collections")


class Config(_Section):
    model: ModelConfig = ModelConfig()
    store: StoreConfig = StoreConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    limits: LimitsConfig = LimitsConfig()
    http: HttpConfig = HttpConfig()
