"""What ``cuda_steps.py`` measures as a whole: the engine, transformers' ``generate``, and vLLM.

There is no step to time, so a step is what 64 more tokens take, over 64.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from prefixd_server.attention import interface
from prefixd_server.config import CacheConfig, Config, ModelConfig, SchedulerConfig, StoreConfig
from prefixd_server.engine.cuda_graphs import CudaGraphRunner
from prefixd_server.errors import EngineDead
from prefixd_server.kv.allocator import pages_for
from prefixd_server.kv.pool import KVPool
from prefixd_server.models.loader import LoadedModel
from prefixd_server.models.probe import observe_geometry
from prefixd_server.types import EngineRequest, Output, SamplingParams
from prefixd_server.wiring import Server

PAGE_SIZE = 16
MORE_TOKENS = 64


class Load(Protocol):
    """What of a load matters without a prefix."""

    @property
    def batch(self) -> int: ...

    @property
    def context(self) -> int: ...


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_ms_of(generate: Callable[[int], object], device: torch.device, repeats: int = 5) -> float:
    """Of something that generates so many tokens at once: what more of them take, over their
    number. The median of pairs, each of a short and a long run one after the other."""

    def once(tokens: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        generate(tokens)
        synchronize(device)
        return (time.perf_counter() - start) * 1e3

    once(2)
    once(2 + MORE_TOKENS)
    differences = [once(2 + MORE_TOKENS) - once(2) for _ in range(repeats)]
    return statistics.median(differences) / MORE_TOKENS


def generate_ms(module: Any, load: Load, device: torch.device) -> float:
    """A decode step of transformers' own loop."""
    ids = torch.randint(0, module.config.vocab_size, (load.batch, load.context), device=device)
    module.set_attn_implementation("sdpa")

    def generate(tokens: int) -> None:
        module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )

    try:
        return step_ms_of(generate, device)
    finally:
        module.set_attn_implementation(interface.IMPLEMENTATION)


def engine_ms(module: Any, load: Load, device: torch.device) -> tuple[str, float]:
    """The case's name, and a decode step of the engine that the server runs."""
    dtype = next(module.parameters()).dtype
    pages = load.batch * (pages_for(load.context + MORE_TOKENS + 2, PAGE_SIZE) + 1)
    geometry = observe_geometry(module, num_layers=module.config.num_hidden_layers)
    page = KVPool.bytes_per_page(
        geometry.num_layers, geometry.num_kv_heads, geometry.head_dim, PAGE_SIZE, dtype
    )
    model = LoadedModel(
        module=module,
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}))),
        name="bench",
        architecture=type(module).__name__,
        fingerprint=None,
        geometry=geometry,
        vocab_size=module.config.vocab_size,
        max_model_len=8192,
        eos_token_ids=frozenset(),
        device=device,
        dtype=dtype,
        weights=str(dtype),
    )
    prompts = torch.randint(0, module.config.vocab_size, (load.batch, load.context)).tolist()
    numbers = itertools.count()
    with tempfile.TemporaryDirectory() as store:
        config = Config(
            model=ModelConfig(),
            store=StoreConfig(store=store),
            cache=CacheConfig(page_size=PAGE_SIZE, kv_cache_bytes=pages * page),
            scheduler=SchedulerConfig(max_num_seqs=load.batch),
        )
        server = Server(config, model=model)
        graphs = isinstance(server.engine.runner, CudaGraphRunner) and server.engine.runner.steps
        outputs: list[Output] = []
        server.mailbox.deliver = outputs.extend

        def generate(tokens: int) -> None:
            outputs.clear()
            sampling = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
            server.mailbox.submit(
                [
                    EngineRequest(
                        f"r{next(numbers)}", "t", None, None, tuple(prompt), sampling, math.inf
                    )
                    for prompt in prompts
                ]
            )
            server.engine.step()
            while server.engine.has_work:
                server.engine.step()
            if sum(len(output.tokens) for output in outputs) != load.batch * tokens:
                raise SystemExit(f"the engine did not run {load} to its end")

        try:
            return "engine, graphs" if graphs else "engine", step_ms_of(generate, device)
        finally:
            server.engine.close(EngineDead("measured"))
            server.close()


def vllm_ms(
    module: Any, loads: Sequence[Load], device: torch.device
) -> Iterator[tuple[Load, float]]:
    """vLLM on the same random weights, the base model alone; it serves no prefixes."""
    if device.type != "cuda":
        return
    try:
        from vllm import LLM
        from vllm import SamplingParams as Sampling
    except ImportError:
        return
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        engine = LLM(folder, skip_tokenizer_init=True, gpu_memory_utilization=0.4)
        for load in loads:
            prompts = torch.randint(
                0, module.config.vocab_size, (load.batch, load.context)
            ).tolist()
            inputs = [{"prompt_token_ids": prompt} for prompt in prompts]

            def run(tokens: int) -> None:
                sampling = Sampling(
                    temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
                )
                engine.generate(inputs, sampling)  # noqa: B023

            yield load, step_ms_of(run, device)
