"""Makes the rooms and joins them: the only place that knows them all; ``cli.py`` runs it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from prefixd_server.attention import AttentionBackend, create_backend
from prefixd_server.attention.native import NativeBackend
from prefixd_server.config import CacheConfig, Config
from prefixd_server.engine.admission import Admission
from prefixd_server.engine.cuda_graphs import CudaGraphRunner
from prefixd_server.engine.engine import Engine
from prefixd_server.engine.mailbox import Mailbox
from prefixd_server.engine.program_runner import ProgramRunner
from prefixd_server.engine.runner import ModelRunner
from prefixd_server.engine.sampling import Sampler
from prefixd_server.engine.scheduler import Scheduler
from prefixd_server.engine.seq2seq_runner import Seq2SeqRunner
from prefixd_server.engine.thread import EngineThread
from prefixd_server.errors import Draining, PrefixdError, UnsupportedModel
from prefixd_server.frontend.service import Frontend
from prefixd_server.frontend.text import TextCodec
from prefixd_server.http.metrics import EngineGauges, Metrics, PromptCacheUsage
from prefixd_server.http.services import ModelInfo, PoolUsage, Services
from prefixd_server.http.spool import Spool
from prefixd_server.kv.allocator import PageAllocator
from prefixd_server.kv.pool import KVPool
from prefixd_server.models.loader import LoadedModel, load_model
from prefixd_server.native import cores, kernels
from prefixd_server.prefix.references import References
from prefixd_server.prefix.registry import Registry
from prefixd_server.prefix.residency import Residency
from prefixd_store.format import Limits
from prefixd_store.store import Store, open_store

__all__ = ["Server"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_CPU_KV_BYTES = 1 << 30
_CUDA_KV_SHARE = 0.8


class Server:
    """A loaded model and all around it; :attr:`services` is what the HTTP application is made from.

    ``on_death`` is called on the engine thread if that ends by itself.
    """

    def __init__(
        self,
        config: Config,
        *,
        model: LoadedModel | None = None,
        store: Store | None = None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.store = store or open_store(config.store.store)
        self.model = model or _on_a_thread_that_ends(lambda: load_model(config.model))
        self.metrics = Metrics(self.model.name, max_tasks=config.http.metrics_max_tasks)
        self.mailbox = Mailbox(config.scheduler.max_queue)
        self.registry = Registry(self.store, config.limits)
        pool = _on_a_thread_that_ends(lambda: _make_pool(self.model, config.cache))
        self._page_bytes = pool.num_bytes // pool.num_pages
        self.allocator = PageAllocator(pool.num_pages, pool.page_size)
        self.residency = Residency(
            self.store,
            self.allocator,
            pool,
            geometry=self.model.geometry,
            fingerprint=self.model.fingerprint,
            cache=config.cache,
            load_timeout_s=config.limits.load_timeout_s,
            limits=_prefix_limits(config),
            wake=self.mailbox.wake,
            observer=self.metrics,
        )
        self.registry.on_change(References(self.residency))
        self.registry.on_change(self.metrics.task_changed)
        self.engine = self._make_engine(pool)
        self.engine_thread = EngineThread(
            self.engine,
            on_start=partial(self._begin_engine, torch.get_num_threads()),
            on_death=on_death,
        )
        self.metrics.bind_engine(self._gauges)
        self.frontend = Frontend(
            self.mailbox,
            TextCodec(self.model.tokenizer),
            max_model_len=self.model.max_model_len,
            vocab_size=self.model.vocab_size,
            encoder_decoder=self.model.seq2seq is not None,
            observer=self.metrics,
        )
        self._spool = Spool()
        self.services = self._make_services(self._spool.path)
        self._closing = threading.Event()
        self._collector = threading.Thread(target=self._collect_garbage, name="prefixd-gc")

    def start(self) -> None:
        """Read the store's tasks and start the threads. Raises StoreUnavailable.

        The caller's thread is to be the event loop's: it gives way to the engine's.
        """
        self._others_give_way = self.model.program is not None and cores.give_way()
        self.registry.start()
        self.engine_thread.start()
        self._collector.start()

    def _begin_engine(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)  # OpenMP keeps the number for each thread
        if self._others_give_way:
            cores.insist()

    def drain(self) -> None:
        """Take no new requests; those in flight go on."""
        self.mailbox.close(Draining)

    def close(self) -> None:
        """Stop the threads and give back files and connections; requests in flight are ended."""
        self._closing.set()
        self.engine_thread.stop()
        self.registry.close()
        if self._collector.ident is not None:
            self._collector.join()
        self.frontend.close()
        self.store.close()
        self._spool.close()

    def _make_engine(self, pool: KVPool) -> Engine:
        config, model = self.config, self.model
        backend = _make_backend(config.model.attention, pool)
        on_cuda = model.device.type == "cuda"
        max_num_seqs = config.scheduler.max_num_seqs
        max_num_batched_tokens = config.scheduler.max_num_batched_tokens or (
            2048 if on_cuda else 512
        )
        return Engine(
            self.mailbox,
            Admission(
                self.registry,
                self.residency,
                self.allocator,
                max_model_len=model.max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                decoder_rules=model.decoder_rules,
            ),
            self.residency,
            Scheduler(
                self.allocator,
                self.residency,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                # bench/prefill.py: how long a long prompt holds up the others.
                max_prefill_tokens=config.scheduler.max_prefill_tokens or (512 if on_cuda else 128),
                # An encoder-decoder's prompt is one token: its text goes through the encoder.
                prompt_cache=config.cache.prompt_cache and model.seq2seq is None,
            ),
            _make_runner(config, model, backend),
            Sampler(model.vocab_size, model.eos_token_ids, model.device),
            eos_token_ids=model.eos_token_ids,
        )

    def _make_services(self, spool: Path) -> Services:
        model = self.model
        return Services(
            config=self.config,
            frontend=self.frontend,
            registry=self.registry,
            store=self.store,
            model=ModelInfo(
                name=model.name,
                fingerprint=model.fingerprint,
                architecture=model.architecture,
                geometry=model.geometry,
                vocab_size=model.vocab_size,
                max_model_len=model.max_model_len,
                dtype=model.weights,
                device=str(model.device),
            ),
            residency=self.residency.state,
            pool=self._pool_usage,
            engine_alive=lambda: self.engine_thread.alive,
            metrics=self.metrics,
            spool=spool,
        )

    def _pool_usage(self) -> PoolUsage:
        allocator = self.allocator
        return PoolUsage(allocator.page_size, allocator.num_pages, allocator.num_free)

    def _gauges(self) -> EngineGauges:
        prompts = self.engine.scheduler.prompt_cache
        return EngineGauges(
            running=self.engine.num_running,
            waiting=self.engine.num_waiting,
            kv_cache_usage=self.allocator.num_used / self.allocator.num_pages,
            preemptions=self.engine.scheduler.num_preemptions,
            resident={str(tier): count for tier, count in self.residency.resident.items()},
            resident_bytes={
                "device": self.residency.device_pages * self._page_bytes,
                "host": self.residency.host_bytes,
            },
            loads=self.residency.loads,
            tasks=self.registry.num_tasks,
            prompt_cache=PromptCacheUsage(
                queries=prompts.num_queried_tokens,
                hits=prompts.num_hit_tokens,
                pages=len(prompts.pages),
                evictions=prompts.pages.num_evictions,
            ),
        )

    def _collect_garbage(self) -> None:
        while not self._closing.wait(self.config.store.gc_interval_s):
            try:
                freed = self.store.collect_garbage()
            except PrefixdError as error:
                log.warning("garbage collection failed: %s", error)
            else:
                log.info("garbage collection freed %d bytes", freed)


def _on_a_thread_that_ends(work: Callable[[], T]) -> T:
    """The engine thread alone shall have OpenMP threads.

    Each thread that runs a large operator of torch's gets a team of its own, and once the teams
    have more threads than there are cores, libgomp puts them to sleep after every operator: a
    decode step of a small model then takes twice as long. A team ends with its thread.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def _prefix_limits(config: Config) -> Limits:
    return Limits(
        max_bytes=config.limits.max_upload_bytes,
        max_virtual_tokens=config.limits.max_virtual_tokens,
    )


def _make_backend(name: str, pool: KVPool) -> AttentionBackend:
    """The fastest one for the device, or the reference where that cannot run."""
    if name != "auto":
        try:
            return _checked(name, pool)
        except Exception as error:
            raise UnsupportedModel(f"--attention {name}: {error}") from error
    fastest = {"cpu": "native", "cuda": "triton"}.get(pool.device.type, "sdpa")
    # Without kernels there is a warning already.
    if fastest == "native" and (pool.dtype != torch.float32 or kernels.load() is None):
        return create_backend("sdpa", pool)
    try:
        return _checked(fastest, pool)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        log.warning("attention runs on the slow reference backend; %s failed: %s", fastest, reason)
        return create_backend("sdpa", pool)


def _checked(name: str, pool: KVPool) -> AttentionBackend:
    backend = create_backend(name, pool)
    backend.check()
    return backend


def _make_runner(config: Config, model: LoadedModel, backend: AttentionBackend) -> ModelRunner:
    if model.seq2seq is not None:
        return Seq2SeqRunner(model.seq2seq, backend, model.device)
    if config.model.cuda_graphs and model.device.type == "cuda":
        max_num_seqs = config.scheduler.max_num_seqs
        runner = CudaGraphRunner(model.module, backend, model.device, max_num_seqs=max_num_seqs)
        runner.capture()
        return runner
    if model.program is not None and isinstance(backend, NativeBackend):
        return ProgramRunner(model.module, model.program, backend, model.device)
    return ModelRunner(model.module, backend, model.device)


def _make_pool(model: LoadedModel, config: CacheConfig) -> KVPool:
    geometry = model.geometry
    page = KVPool.bytes_per_page(
        geometry.num_kv_layers,
        geometry.num_kv_heads,
        geometry.head_dim,
        config.page_size,
        model.dtype,
    )
    budget = config.kv_cache_bytes or _default_kv_bytes(model.device)
    if budget < page:
        raise UnsupportedModel(
            f"kv_cache_bytes is {budget}; one page of {config.page_size} tokens takes {page}"
        )
    return KVPool(
        num_layers=geometry.num_kv_layers,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        num_pages=budget // page,
        page_size=config.page_size,
        dtype=model.dtype,
        device=model.device,
    )


def _default_kv_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_KV_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * _CUDA_KV_SHARE)
