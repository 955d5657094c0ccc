"""A whole engine but for the model: mailbox, admission, registry, residency, scheduler and sampler.

The model's place is taken by a rule that makes the next token from the prefix and the tokens so
far, so that what a request must answer is known whatever happened around it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from prefixd_server.config import LimitsConfig
from prefixd_server.engine.admission import Admission
from prefixd_server.engine.beam_search import BeamSearch
from prefixd_server.engine.engine import Engine
from prefixd_server.engine.mailbox import Mailbox
from prefixd_server.engine.runner import ModelRunner, StepLogits
from prefixd_server.engine.sampling import Sampler
from prefixd_server.engine.scheduler import Scheduled, Scheduler
from prefixd_server.engine.sequence import Sequence
from prefixd_server.prefix import Registry
from prefixd_server.types import EngineRequest, Finish, Output, PrefixState, SamplingParams
from tests.prefix.support import TENANT, World

VOCAB = 16
EOS = 0
NAN, BOOM = 14, 15
"""a prompt that begins so gives NaN logits after one token; makes the forward raise"""


def next_token(prefix: str | None, tokens: Seq[int]) -> int:
    """Any of 0 … 13, EOS now and then."""
    return random.Random(f"{prefix} {list(tokens)}").randrange(NAN)


def expected_tokens(prefix: str | None, prompt: Seq[int], max_new_tokens: int) -> list[int]:
    output: list[int] = []
    while len(output) < max_new_tokens and EOS not in output:
        output.append(next_token(prefix, [*prompt, *output]))
    return output


def beam_logits(prefix: str | None, tokens: Seq[int]) -> Tensor:
    """What a beam search gets: no two tokens alike. [VOCAB], as all logits."""
    seed = random.Random(f"{prefix} {list(tokens)}").getrandbits(60)
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def expected_hypotheses(
    prefix: str | None, request: EngineRequest
) -> list[tuple[list[int], float]]:
    """The search with no engine around it; ``test_beam_search`` compares it with transformers."""
    params = request.sampling
    assert params.beams is not None
    search = BeamSearch(
        params.beams, max_new_tokens=params.max_new_tokens, ending_ids=frozenset({EOS})
    )
    while not search.done:
        rows = [[*request.prompt_token_ids, *(t.id for t in beam)] for beam in search.running]
        logprobs = torch.stack([beam_logits(prefix, row) for row in rows]).log_softmax(-1)
        search.advance(logprobs, logprobs)
    return [([token.id for token in tokens], score) for tokens, score in search.best()]


class RuleRunner:
    """In the model's place. Each sequence's leased pages must hold its prefix, and its own pages
    its tokens, in every step."""

    def __init__(self, world: World, *, asynchronous: bool) -> None:
        self.world = world
        self.asynchronous = asynchronous
        self.kv: dict[tuple[int, int], object] = {}
        """(page, offset) → what a token's KV depend on: the prefix, and all tokens up to it"""
        self.num_computed = 0
        self.seeds = {version.key: seed for seed, version in enumerate(world.versions)}
        self.num_steps = 0
        self.failure: Exception = RuntimeError("the forward failed, as the test asked")
        self.broken: Exception | None = None
        """what the device says to every call from now on"""

    def check(self) -> None:
        if self.broken is not None:
            raise self.broken

    def run(self, step: Seq[Scheduled]) -> StepLogits:
        self.num_steps += 1
        for sequence, _ in step:
            if sequence.prefix is not None:
                assert sequence.lease is not None
                self.world.assert_holds(sequence.lease, self.seeds[sequence.prefix.key])
        for sequence, count in step:
            self._write(sequence, count)
        for sequence, count in step:
            self._assert_holds_tokens(sequence, sequence.num_computed + count)
        if any(sequence.prompt_token_ids[0] == BOOM for sequence, _ in step):
            raise self.failure
        ready = [
            sequence
            for sequence, count in step
            if count == sequence.num_uncomputed and not sequence.request.capture_kv
        ]
        rows = [self._logits(sequence) for sequence in ready]
        return StepLogits(ready, torch.stack(rows) if rows else torch.empty(0, VOCAB), [])

    def copy_pages(self, copies: Seq[tuple[int, int]]) -> None:
        sources, targets = zip(*copies, strict=True)
        assert len(set(targets)) == len(targets)
        assert not set(sources) & set(targets)
        size = self.world.allocator.page_size
        for offset in range(size):
            for source, target in copies:
                self.kv[target, offset] = self.kv.get((source, offset))

    def _write(self, sequence: Sequence, count: int) -> None:
        allocator, start = self.world.allocator, sequence.num_computed
        self.num_computed += count
        for i in range(start, start + count):
            page, offset = sequence.pages[i // allocator.page_size], i % allocator.page_size
            assert allocator.references(page) == 1, "written where another sequence reads"
            self.kv[page, offset] = _history(sequence, i)

    def _assert_holds_tokens(self, sequence: Sequence, stop: int) -> None:
        size = self.world.allocator.page_size
        held = [self.kv[sequence.pages[i // size], i % size] for i in range(stop)]
        assert held == [_history(sequence, i) for i in range(stop)]

    def _logits(self, sequence: Sequence) -> Tensor:
        if sequence.prompt_token_ids[0] == NAN and sequence.output_token_ids:
            return torch.full((VOCAB,), float("nan"))
        prefix = sequence.prefix.sha256 if sequence.prefix else None
        tokens = sequence.tokens(0, sequence.num_tokens)
        if sequence.params.beams is not None:
            return beam_logits(prefix, tokens)
        logits = torch.zeros(VOCAB)
        logits[next_token(prefix, tokens)] = 5.0
        return logits

    def read_kv(self, sequence: Sequence) -> tuple[Tensor, Tensor]:
        """[L=1, H_kv=1, num_computed, D=2]: each token's id, and its negative."""
        tokens = torch.tensor(sequence.tokens(0, sequence.num_computed), dtype=torch.float32)
        key = tokens.view(1, 1, -1, 1).repeat(1, 1, 1, 2)
        return key, -key


def _history(sequence: Sequence, i: int) -> tuple[object, ...]:
    prefix = sequence.prefix.sha256 if sequence.prefix else None
    return (sequence.request.tenant, prefix, *sequence.tokens(0, i + 1))


class Rig:
    """Tasks t0, t1, … with prefixes of ``sizes`` tokens. Time stands still but for the test."""

    def __init__(
        self,
        root: Path,
        sizes: Seq[int] = (5, 7, 3),
        *,
        num_pages: int = 24,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        max_queue: int = 100,
        by_hand: bool = True,
        asynchronous: bool = False,
        prompt_cache: bool = True,
    ) -> None:
        self.world = World(root, sizes, num_pages=num_pages, by_hand=by_hand, load_retry_s=0.0)
        registry = Registry(self.world.store, LimitsConfig())
        for version in self.world.versions:
            registry.get(TENANT, version.task)
        self.now = 0.0
        self.mailbox = Mailbox(max_queue)
        self.mailbox.deliver = self._deliver
        self.runner = RuleRunner(self.world, asynchronous=asynchronous)
        allocator, residency = self.world.allocator, self.world.residency
        self.engine = Engine(
            self.mailbox,
            Admission(
                registry,
                residency,
                allocator,
                max_model_len=64,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
            ),
            residency,
            Scheduler(
                allocator,
                residency,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                prompt_cache=prompt_cache,
            ),
            cast(ModelRunner, self.runner),
            Sampler(VOCAB, frozenset({EOS}), "cpu"),
            eos_token_ids=frozenset({EOS}),
            clock=lambda: self.now,
        )
        self.requests: dict[str, EngineRequest] = {}
        self.outputs: dict[str, list[Output]] = {}

    def submit(
        self,
        prompt: Seq[int] = (1, 2, 3),
        task: str | None = None,
        *,
        deadline: float = float("inf"),
        capture_kv: bool = False,
        leading_special_tokens: int = 0,
        tenant: str = TENANT,
        **sampling: object,
    ) -> str:
        sampling.setdefault("max_new_tokens", 5)
        number = len(self.requests)
        request = EngineRequest(
            request_id=f"r{number}",
            tenant=tenant,
            task=task,
            version=None,
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
            deadline=deadline,
            leading_special_tokens=leading_special_tokens,
            arrival=float(number),
            capture_kv=capture_kv,
        )
        self.mailbox.submit([request])
        self.requests[request.request_id] = request
        self.outputs[request.request_id] = []
        return request.request_id

    def abort(self, request_id: str) -> None:
        self.mailbox.abort([request_id])

    def step(self) -> bool:
        ran = self.engine.step()
        self.engine.check()
        self._check_outputs()
        return ran

    def finish_all(self, max_steps: int = 5000) -> None:
        """Load what is asked for and step until all requests have ended."""
        for _ in range(max_steps):
            self.step()
            if not self.engine.has_work:
                return
            self.world.executor.run_all()
        raise AssertionError(f"{sorted(self._unfinished())} do not end")

    def _unfinished(self) -> set[str]:
        return {
            id_ for id_, outputs in self.outputs.items() if not outputs or not outputs[-1].finish
        }

    def finish(self, request_id: str) -> Finish:
        (finish,) = [o.finish for o in self.outputs[request_id] if o.finish is not None]
        return finish

    def error(self, request_id: str) -> Exception:
        error = self.finish(request_id).error
        assert error is not None
        return error

    def tokens(self, request_id: str) -> list[int]:
        return [token.id for output in self.outputs[request_id] for token in output.tokens]

    def hypotheses(self, request_id: str) -> list[tuple[list[int], float]]:
        found = self.finish(request_id).hypotheses
        return [([token.id for token in h.tokens], h.score) for h in found]

    def expected_hypotheses(self, request_id: str) -> list[tuple[list[int], float]]:
        request = self.requests[request_id]
        return expected_hypotheses(self._prefix(request), request)

    def _prefix(self, request: EngineRequest) -> str | None:
        shas = {version.task: version.sha256 for version in self.world.versions}
        return shas[request.task] if request.task else None

    def expected(self, request_id: str) -> list[int]:
        request = self.requests[request_id]
        prefix = self._prefix(request)
        return expected_tokens(prefix, request.prompt_token_ids, request.sampling.max_new_tokens)

    def assert_empty(self) -> None:
        """No request holds a page, a lease or a pin: what nobody names any more goes at once."""
        assert not self.engine.has_work
        self.engine.check()
        self.world.settle_jobs()
        for version in self.world.versions:
            self.world.residency.retire(version.key)
        self.world.residency.poll()
        assert [self.world.state(version) for version in self.world.versions] == [
            PrefixState.STORED for _ in self.world.versions
        ]
        assert self.world.allocator.num_used == 0

    def _deliver(self, outputs: Seq[Output]) -> None:
        for output in outputs:
            self.outputs[output.request_id].append(output)

    def _check_outputs(self) -> None:
        for outputs in self.outputs.values():
            finished = [output.finish is not None for output in outputs]
            assert not any(finished[:-1]), "something came after the terminal output"
            started = [output.started is not None for output in outputs]
            assert sum(started) <= 1
            first = next((i for i, o in enumerate(outputs) if o.tokens), None)
            assert first is None or started[first], "a token before Started"
