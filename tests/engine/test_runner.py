"""The runner against the same model run densely: ragged, chunked, preempted and mixed steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from prefixd_server.attention import create_backend, interface
from prefixd_server.engine.runner import ModelRunner, StepLogits
from prefixd_server.engine.sampling import prompt_logprobs
from prefixd_server.engine.scheduler import Scheduler
from prefixd_server.engine.sequence import Sequence
from prefixd_server.kv.allocator import PageAllocator
from prefixd_server.kv.pool import KVPool
from prefixd_server.models.probe import observe_geometry
from prefixd_server.types import EngineRequest, PrefixVersion, SamplingParams
from tests.engine.scheduler_oracle import Place
from tests.engine.scheduler_world import TENANT, FakePrefixes
from tests.support.models import TINY
from tests.support.threads import one_thread

__all__ = ["one_thread"]

VOCAB = 97
CPU = torch.device("cpu")
TOLERANCE = 1e-4


class Models:
    """One set of random weights twice: with prefixd's attention, and as transformers runs it."""

    def __init__(self, family: str) -> None:
        interface.register()
        torch.manual_seed(0)
        self.dense = AutoModelForCausalLM.from_config(
            TINY[family](VOCAB), attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            for parameter in self.dense.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
        config = TINY[family](VOCAB)
        self.served = AutoModelForCausalLM.from_config(
            config, attn_implementation=interface.IMPLEMENTATION
        ).eval()
        self.served.load_state_dict(self.dense.state_dict())
        self.geometry = observe_geometry(self.served, num_layers=config.num_hidden_layers)

    def prefix(self, num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        """Random keys and values, each [L, H_kv, P, D]."""
        shape = (self.geometry.num_layers, self.geometry.num_kv_heads)
        shape += (num_tokens, self.geometry.head_dim)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)

    @torch.inference_mode()
    def logits(
        self, tokens: list[int], prefix: tuple[Tensor, Tensor] | None, offset: int
    ) -> Tensor:
        """[len(tokens), V] of one sequence run alone, all at once."""
        cache = DynamicCache()
        if prefix is not None:
            for layer, (key, value) in enumerate(zip(*prefix, strict=True)):
                cache.update(key[None], value[None], layer)
        positions = torch.arange(offset, offset + len(tokens))[None]
        output = self.dense(
            input_ids=torch.tensor([tokens]), position_ids=positions, past_key_values=cache
        )
        return output.logits[0]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def models(request: pytest.FixtureRequest, one_thread: None) -> Models:
    return Models(request.param)


@dataclass
class Answer:
    sequence: Sequence
    rows: list[Tensor] = field(default_factory=list)
    """the logits [V] each token was chosen from"""


class Loop:
    """schedule → run → greedy choice, over a real pool; what the engine does, and nothing more."""

    def __init__(self, models: Models, *, num_pages: int = 64, budget: int = 64) -> None:
        self.models = models
        geometry = models.geometry
        self.allocator = PageAllocator(num_pages, page_size=4)
        self.pool = KVPool(
            num_layers=geometry.num_layers,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            num_pages=num_pages,
            page_size=4,
            dtype=torch.float32,
            device=CPU,
        )
        self.prefixes = FakePrefixes(self.allocator)
        self.scheduler = Scheduler(
            self.allocator, self.prefixes, max_num_seqs=16, max_num_batched_tokens=budget
        )
        self.runner = ModelRunner(models.served, create_backend("sdpa", self.pool), CPU)
        self.kv: dict[str, tuple[Tensor, Tensor]] = {}
        self.answers: list[Answer] = []
        self.num_logit_rows: list[int] = []
        models.served.get_output_embeddings().register_forward_hook(self._count_rows)

    def _count_rows(self, module: Any, args: Any, output: Tensor) -> None:
        self.num_logit_rows.append(output.shape[1])

    def add_prefix(self, name: str, num_tokens: int, query_offset: int) -> PrefixVersion:
        version = PrefixVersion(TENANT, name, 1, f"sha-{name}", num_tokens, query_offset)
        self.kv[name] = self.models.prefix(num_tokens, seed=num_tokens)
        self.prefixes.add(version, Place.HOST)
        return version

    def _copy_prefixes(self) -> None:
        for key, entry in self.prefixes.entries.items():
            if self.prefixes.places[key] is Place.COPYING:
                arrays = [tensor.numpy() for tensor in self.kv[entry.version.task]]
                self.pool.write_prefix(entry.pages, *arrays, "float32")
                self.prefixes.places[key] = Place.DEVICE

    def add(
        self,
        prompt: list[int],
        new: int,
        prefix: PrefixVersion | None = None,
        *,
        capture_kv: bool = False,
        want_prompt: bool = True,
    ) -> Answer:
        number = len(self.answers)
        params = SamplingParams(max_new_tokens=new, prompt_logprobs=want_prompt)
        request = EngineRequest(
            f"r{number}",
            TENANT,
            None,
            None,
            tuple(prompt),
            params,
            float("inf"),
            arrival=float(number),
            capture_kv=capture_kv,
        )
        answer = Answer(Sequence(request, request.prompt_token_ids, prefix))
        self.scheduler.add(answer.sequence)
        self.answers.append(answer)
        return answer

    def run_step(self) -> None:
        self._copy_prefixes()
        step = self.scheduler.schedule().scheduled
        if not step:
            return
        logits = self.runner.run(step)
        for sequence, rows, targets in logits.prompt:
            sequence.prompt_logprobs += prompt_logprobs(rows, targets)
        for sequence, count in step:
            sequence.num_computed += count
        self._choose(logits)

    def _choose(self, logits: StepLogits) -> None:
        for sequence, row in zip(logits.sequences, logits.next_token, strict=True):
            (answer,) = [a for a in self.answers if a.sequence is sequence]
            answer.rows.append(row)
            sequence.started = True
            sequence.output_token_ids.append(int(row.argmax()))
            if len(sequence.output_token_ids) == sequence.params.max_new_tokens:
                self.scheduler.release(sequence)

    def run_all(self) -> None:
        while self.scheduler.waiting or self.scheduler.running:
            self.run_step()

    def check(self, answer: Answer) -> None:
        """Every row and every prompt log-probability is the dense model's."""
        sequence = answer.sequence
        prompt, output = list(sequence.prompt_token_ids), sequence.output_token_ids
        prefix = self.kv[sequence.prefix.task] if sequence.prefix else None
        dense = self.models.logits([*prompt, *output[:-1]], prefix, sequence.position_offset)
        torch.testing.assert_close(
            torch.stack(answer.rows), dense[len(prompt) - 1 :], atol=TOLERANCE, rtol=TOLERANCE
        )
        assert output == dense[len(prompt) - 1 :].argmax(-1).tolist()
        logprobs = dense.log_softmax(-1)
        wanted = [logprobs[i, token].item() for i, token in enumerate(prompt[1:])]
        assert sequence.prompt_logprobs == pytest.approx(wanted, abs=TOLERANCE)


def draw_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def fill(loop: Loop) -> None:
    """Six ragged requests over two prefixes (one with its own positions, one without) and none."""
    moved = loop.add_prefix("moved", 7, query_offset=7)
    unmoved = loop.add_prefix("unmoved", 9, query_offset=0)
    for i, prefix in enumerate([None, moved, unmoved, moved, None, unmoved]):
        loop.add(draw_prompt([1, 13, 22, 5, 30, 2][i], seed=i), 4 + i, prefix)


@pytest.mark.parametrize("budget", [200, 8, 1], ids="budget {}".format)
def test_mixed_steps_give_the_dense_models_logits(models: Models, budget: int) -> None:
    loop = Loop(models, budget=budget)
    fill(loop)
    loop.run_all()
    for answer in loop.answers:
        loop.check(answer)
    assert loop.scheduler.num_preemptions == 0


def test_preemption_changes_no_logit(models: Models) -> None:
    loop = Loop(models, num_pages=16, budget=12)
    fill(loop)
    loop.run_all()
    for answer in loop.answers:
        loop.check(answer)
    assert loop.scheduler.num_preemptions > 0


def test_a_preempted_prefill_notes_each_prompt_logprob_once(models: Models) -> None:
    loop = Loop(models, num_pages=10, budget=6)
    first = loop.add(draw_prompt(4, seed=0), 20)
    loop.run_step()
    second = loop.add(draw_prompt(24, seed=1), 2)
    while not second.sequence.prompt_logprobs:
        loop.run_step()
    noted = len(second.sequence.prompt_logprobs)
    loop.scheduler._preempt(second.sequence)
    assert 0 < noted < 23
    loop.run_all()
    loop.check(first)
    loop.check(second)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda loop: [loop.add(draw_prompt(20, 0), 1, want_prompt=False)], [1]),
        (lambda loop: [loop.add(draw_prompt(20, 0), 1)], [20]),
        (lambda loop: [loop.add(draw_prompt(60, 0), 1)], [50, 10]),
        (lambda loop: [loop.add(draw_prompt(60, 0), 1, want_prompt=False)], [0, 1]),
        (lambda loop: [loop.add([5], 2, want_prompt=i > 0) for i in range(3)], [3, 3]),
    ],
    ids=["last only", "all", "all, in chunks", "none of the first chunk", "decodes"],
)
def test_only_rows_that_are_needed_go_through_the_output_layer(
    models: Models, make: Callable[[Loop], list[Answer]], expected: list[int]
) -> None:
    loop = Loop(models, budget=50)
    make(loop)
    loop.run_all()
    assert loop.num_logit_rows == expected


def test_a_preempted_decode_asks_for_no_prompt_row_again(models: Models) -> None:
    loop = Loop(models)
    answer = loop.add(draw_prompt(9, seed=0), 4)
    loop.run_step()
    loop.run_step()
    loop.scheduler._preempt(answer.sequence)
    loop.run_all()
    loop.check(answer)
    assert loop.num_logit_rows == [9, 1, 1, 1]


def test_captured_kv_is_the_dense_models_cache(models: Models) -> None:
    loop = Loop(models, budget=5)
    prompt = draw_prompt(13, seed=4)
    sequence = loop.add(prompt, 1, capture_kv=True, want_prompt=False).sequence
    while sequence.num_uncomputed:
        loop.run_step()
    key, value = loop.runner.read_kv(sequence)
    cache = DynamicCache()
    with torch.inference_mode():
        models.dense(input_ids=torch.tensor([prompt]), past_key_values=cache)
    for layer, cached in enumerate(cache.layers):
        torch.testing.assert_close(key[layer], cached.keys[0], atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(value[layer], cached.values[0], atol=TOLERANCE, rtol=TOLERANCE)
    assert loop.num_logit_rows == [0, 0, 0]


def test_only_a_device_beside_the_host_is_asked_how_it_is(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    backend = Loop(models).runner.backend
    ModelRunner(models.served, backend, CPU).check()
    with pytest.raises(RuntimeError, match="illegal"):
        ModelRunner(models.served, backend, torch.device("cuda")).check()
