"""Decodes with prefixd's engine, as a server would: what is scored is what clients would get."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefixd_server.config import CacheConfig, Config, ModelConfig, SchedulerConfig, StoreConfig
from prefixd_server.errors import EngineDead
from prefixd_server.types import EngineRequest, Output, SamplingParams
from prefixd_server.wiring import Server
from prefixd_store.importers import import_checkpoint
from prefixd_store.records import DEFAULT_TENANT
from prefixd_train.lm import FrozenLM
from prefixd_train.save import save_prefix
from prefixd_train.sites import PrefixKV

__all__ = ["Engine", "engine_of_module"]

KV_BYTES = 256 << 20
MAX_QUEUE = 100_000
DAY_S = 86_400.0


class Engine:
    """One model in an engine without HTTP; to be closed. ``model``: a folder."""

    def __init__(self, model: Path, device: str = "cpu") -> None:
        self._folder = TemporaryDirectory()
        self.folder = Path(self._folder.name)
        config = Config(
            model=ModelConfig.model_validate(
                {"model": str(model), "device": device, "dtype": "float32"}
            ),
            store=StoreConfig(store=str(self.folder / "store")),
            cache=CacheConfig(kv_cache_bytes=KV_BYTES),
            scheduler=SchedulerConfig(max_queue=MAX_QUEUE, max_num_seqs=64),
        )
        self.server = Server(config, on_death=self._died)
        self.server.mailbox.deliver = self._deliver
        self.server.start()
        self._tokens: dict[str, list[int]] = {}
        self._unfinished: set[str] = set()
        self._error: Exception | None = None
        self._done = threading.Event()
        self._prefixes = 0

    @cached_property
    def line_ends(self) -> frozenset[int]:
        """Tokens with a line end in their text."""
        tokenizer: Any = self.server.model.tokenizer
        texts = enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))]))
        return frozenset(i for i, text in texts if "\n" in text)

    def register(self, lm: FrozenLM, kv: PrefixKV) -> str:
        """The name of a new task with this prefix."""
        self._prefixes += 1
        source, blob = self.folder / "prefix.safetensors", self.folder / "blob.safetensors"
        save_prefix(source, lm, kv, training={})
        geometry = self.server.model.geometry
        found = import_checkpoint({source.name: source}, blob, geometry=geometry)
        version = found.manifest.version_record(found.sha256, found.bytes)
        task = f"prefix-{self._prefixes}"
        self.server.registry.publish(DEFAULT_TENANT, task, blob, version)
        return task

    def forget(self, task: str) -> None:
        self.server.registry.delete_task(DEFAULT_TENANT, task)

    def lines(
        self, prompts: Sequence[Sequence[int]], task: str | None, *, max_new_tokens: int
    ) -> list[list[int]]:
        """Greedy tokens of each prompt, without the end of sequence, at least up to the end of the
        first line that is not blank."""
        params = SamplingParams(max_new_tokens=max_new_tokens, stop_token_ids=self.line_ends)
        made = self._run(prompts, task, params)
        text = self.server.model.tokenizer.decode
        blank = [i for i, ids in enumerate(made) if not str(text(ids)).strip()]
        if blank:
            again = SamplingParams(max_new_tokens=max_new_tokens)
            for i, ids in zip(
                blank, self._run([prompts[i] for i in blank], task, again), strict=True
            ):
                made[i] = ids
        return made

    def _run(
        self, prompts: Sequence[Sequence[int]], task: str | None, sampling: SamplingParams
    ) -> list[list[int]]:
        names = [str(number) for number in range(len(prompts))]
        self._tokens = {name: [] for name in names}
        self._unfinished = set(names)
        self._done.clear()
        now = time.monotonic()
        self.server.mailbox.submit(
            [
                EngineRequest(
                    request_id=name,
                    tenant=DEFAULT_TENANT,
                    task=task,
                    version=None,
                    prompt_token_ids=tuple(prompt),
                    sampling=sampling,
                    deadline=now + DAY_S,
                    arrival=now,
                )
                for name, prompt in zip(names, prompts, strict=True)
            ]
        )
        self._done.wait()
        if self._error is not None:
            raise self._error
        eos = self.server.model.eos_token_ids
        return [[id for id in self._tokens[name] if id not in eos] for name in names]

    def _died(self) -> None:
        self._error = EngineDead("the engine has stopped")
        self._done.set()

    def _deliver(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            self._tokens[output.request_id] += [token.id for token in output.tokens]
            if output.finish is not None:
                self._unfinished.discard(output.request_id)
                self._error = self._error or output.finish.error
        if not self._unfinished:
            self._done.set()

    def close(self) -> None:
        self.server.close()
        self._folder.cleanup()


def engine_of_module(module: Any, tokenizer: Any, device: str = "cpu") -> Engine:
    """Of transformers' model with weights of its own."""
    with TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return Engine(Path(folder), device)
