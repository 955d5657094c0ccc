"""The engine: one :meth:`Engine.step` is receive, schedule, run, sample, commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch

from prefixd_server.engine.admission import Admission
from prefixd_server.engine.beam_decoder import BeamDecoder, NoDistribution
from prefixd_server.engine.mailbox import Abort, Mailbox, Submit
from prefixd_server.engine.runner import ModelRunner, StepLogits
from prefixd_server.engine.sampling import Sampler, prompt_logprobs
from prefixd_server.engine.scheduler import Scheduled, Scheduler, Step
from prefixd_server.engine.sequence import Sequence
from prefixd_server.errors import DeadlineExceeded, PrefixdError, Unavailable
from prefixd_server.prefix.residency import Residency
from prefixd_server.types import (
    CompileOutput,
    EngineRequest,
    Finish,
    FinishReason,
    Output,
    PrefixState,
    Started,
    Token,
)

__all__ = ["Engine", "StepFailed"]

log = logging.getLogger(__name__)


class StepFailed(PrefixdError):
    """The forward pass or the sampling of a step failed; the requests in it end with this."""

    code = "internal_error"


class Engine:
    """Owns every sequence from submit to its one terminal output. Used by one thread only."""

    def __init__(
        self,
        mailbox: Mailbox,
        admission: Admission,
        residency: Residency,
        scheduler: Scheduler,
        runner: ModelRunner,
        sampler: Sampler,
        *,
        eos_token_ids: frozenset[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mailbox = mailbox
        self.admission = admission
        self.residency = residency
        self.scheduler = scheduler
        self.runner = runner
        self.sampler = sampler
        self.beam_decoder = BeamDecoder(scheduler.allocator, eos_token_ids)
        self.eos_token_ids = eos_token_ids
        self.clock = clock
        self._sequences: dict[str, Sequence] = {}
        self._outputs: list[Output] = []

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    def step(self) -> bool:
        """Run one step and deliver its outputs.

        Returns False if there was nothing to run (all sequences, if any, wait for their prefix).
        Raises only where the device computes nothing any more, or for a bug outside the model.
        """
        self._receive()
        self._expire()
        step = self.scheduler.schedule()
        if step.failed:
            # A load fails by the device too; without steps nothing else would tell.
            self.runner.check()
        for sequence, error in step.failed:
            self._finish(sequence, Finish(FinishReason.ERROR, error))
        if step.scheduled:
            self._run(step)
        if not (step.scheduled and self.runner.asynchronous and self.scheduler.running):
            self._deliver()
        return bool(step.scheduled)

    def close(self, error: PrefixdError) -> None:
        """End every sequence with ``error``, received yet or not, and give all pages back.

        Whatever has broken, nothing is admitted and each sequence is told.
        """
        finish = Finish(FinishReason.ERROR, error)
        for command in self.mailbox.drain():
            if isinstance(command, Submit):
                self._outputs.append(Output(command.request.request_id, finish=finish))
        for sequence in list(self._sequences.values()):
            try:
                self._finish(sequence, finish)
            except Exception:
                log.exception("request %s could not be given back", sequence.request_id)
        self._deliver()
        self.residency.close()

    def check(self) -> None:
        """Assert that every page, lease and pin has exactly one owner. Cheap enough when idle."""
        self.scheduler.check()
        self.residency.check()
        owners = [*self.scheduler.owned_pages(), *self.residency.owned_pages()]
        self.scheduler.allocator.check(owners)
        queued = {*self.scheduler.waiting, *self.scheduler.running}
        assert queued == set(self._sequences.values())

    # --- receive ---------------------------------------------------------------------------------

    def _receive(self) -> None:
        for command in self.mailbox.drain():
            match command:
                case Submit(request):
                    self._admit(request)
                case Abort(request_id):
                    if request_id in self._sequences:
                        self._finish(self._sequences[request_id], Finish(FinishReason.ABORTED))
        self.residency.poll()
        self.mailbox.num_waiting = self.num_waiting

    def _admit(self, request: EngineRequest) -> None:
        assert request.request_id not in self._sequences
        try:
            sequence = self.admission.admit(request)
        except PrefixdError as error:
            finish = Finish(FinishReason.ERROR, error)
            self._outputs.append(Output(request.request_id, finish=finish))
            return
        if request.sampling.beams is not None:
            self.beam_decoder.begin(sequence)
        self._sequences[request.request_id] = sequence
        self.scheduler.add(sequence)

    def _expire(self) -> None:
        now = self.clock()
        for sequence in list(self._sequences.values()):
            if now >= sequence.request.deadline:
                self._finish(sequence, Finish(FinishReason.ERROR, self._late(sequence)))

    def _late(self, sequence: Sequence) -> PrefixdError:
        prefix = sequence.prefix
        if prefix is not None and not sequence.started:
            state = self.residency.state(prefix.key)
            if state in (PrefixState.STORED, PrefixState.LOADING):
                return Unavailable(
                    f"the prefix of {prefix.task}@{prefix.version} was not loaded within the"
                    f" request's deadline (it is {state})"
                )
        return DeadlineExceeded("the request's deadline passed", param="parameters.timeout_s")

    # --- run, sample, commit ---------------------------------------------------------------------

    def _run(self, step: Step) -> None:
        try:
            if step.copies:
                self.runner.copy_pages(step.copies)
            logits = self.runner.run(step.scheduled)
            if self.runner.asynchronous:
                # The outputs of the step before: what they set off runs beside the device.
                self._deliver()
            tokens = self._sample(logits)
            self._note_prompt_logprobs(logits)
            for sequence, count in step.scheduled:
                sequence.num_computed += count
            self._commit(step.scheduled, tokens)
            self._search(logits)
        except Exception:
            # One broken step must not end the server: its requests fail, the others go on.
            log.exception("a step of %d sequences failed", len(step.scheduled))
            # After a broken device nothing goes on: what this raises ends the engine.
            self.runner.check()
            for sequence, _ in step.scheduled:
                self.scheduler.prompt_cache.drop(sequence)
                error = StepFailed("the model failed to run this request's step")
                self._finish(sequence, Finish(FinishReason.ERROR, error))

    def _sample(self, logits: StepLogits) -> dict[Sequence, Token | None]:
        """The next token of each sequence that draws one, alone."""
        drawing = [i for i, s in enumerate(logits.sequences) if s.params.beams is None]
        rows, sequences = logits.next_token, logits.sequences
        if len(drawing) < len(sequences):
            rows, sequences = rows[drawing], [sequences[i] for i in drawing]
        return dict(zip(sequences, self.sampler.sample(rows, sequences), strict=True))

    def _search(self, logits: StepLogits) -> None:
        """One step of each beam search; the rows of its hypotheses are in their order."""
        rows: dict[str, list[int]] = {}
        for i, sequence in enumerate(logits.sequences):
            if sequence.params.beams is not None:
                rows.setdefault(sequence.request_id, []).append(i)
        for request_id, mine in rows.items():
            sequence = self._sequences[request_id]
            try:
                finish = self.beam_decoder.advance(sequence, logits.next_token[mine])
            except NoDistribution:
                self._fail_without_logits(sequence)
                continue
            self.scheduler.prompt_cache.offer(sequence)
            if finish is not None:
                self._finish(sequence, finish)
            elif not sequence.started:
                self._emit(sequence, ())

    def _note_prompt_logprobs(self, logits: StepLogits) -> None:
        for sequence, rows, targets in logits.prompt:
            sequence.prompt_logprobs += prompt_logprobs(rows, targets.to(rows.device))

    def _commit(self, step: Seq[Scheduled], tokens: dict[Sequence, Token | None]) -> None:
        for sequence, _ in step:
            if sequence.request.capture_kv and sequence.num_uncomputed == 0:
                self._finish(
                    sequence, Finish(FinishReason.LENGTH, compiled=self._capture(sequence))
                )
            elif sequence in tokens:
                self._append(sequence, tokens[sequence])

    def _append(self, sequence: Sequence, token: Token | None) -> None:
        if token is None:
            self._fail_without_logits(sequence)
            return
        self.scheduler.prompt_cache.offer(sequence)
        sequence.output_token_ids.append(token.id)
        reason = self._finish_reason(sequence, token.id)
        if reason is None:
            self._emit(sequence, (token,))
        else:
            self._finish(sequence, Finish(reason), (token,))

    def _fail_without_logits(self, sequence: Sequence) -> None:
        """Its logits are not finite: nothing that it computed, or began with, is to be trusted."""
        self.scheduler.prompt_cache.drop(sequence)
        error = StepFailed("the model returned no finite logits for this request")
        self._finish(sequence, Finish(FinishReason.ERROR, error))

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        params = sequence.params
        if not params.ignore_eos and token_id in self.eos_token_ids:
            return FinishReason.EOS
        if token_id in params.stop_token_ids:
            return FinishReason.STOP
        if len(sequence.output_token_ids) >= params.max_new_tokens:
            return FinishReason.LENGTH
        return None

    def _capture(self, sequence: Sequence) -> CompileOutput:
        key, value = self.runner.read_kv(sequence)
        layers, heads, tokens, dim = key.shape
        return CompileOutput(
            shape=(layers, heads, tokens, dim),
            dtype=str(key.dtype).removeprefix("torch."),
            key=key.view(torch.uint8).numpy().tobytes(),
            value=value.view(torch.uint8).numpy().tobytes(),
        )

    # --- outputs ---------------------------------------------------------------------------------

    def _emit(
        self, sequence: Sequence, tokens: tuple[Token, ...], finish: Finish | None = None
    ) -> None:
        started = None
        well = finish is None or bool(finish.compiled or finish.hypotheses)
        if not sequence.started and (tokens or well):
            sequence.started = True
            started = Started(
                version=sequence.prefix.version if sequence.prefix else None,
                prefix_tokens=sequence.prefix.num_virtual_tokens if sequence.prefix else 0,
                prompt_token_ids=sequence.encoder_token_ids or sequence.prompt_token_ids,
                prompt_logprobs=tuple(sequence.prompt_logprobs),
            )
        self._outputs.append(Output(sequence.request_id, started, tokens, finish))

    def _finish(self, sequence: Sequence, finish: Finish, tokens: tuple[Token, ...] = ()) -> None:
        """The one way out: say so once, and give back everything.

        A hypothesis stands for its request, so the step that breaks may name any of them.
        """
        known = self._sequences.pop(sequence.request_id, None)
        if known is None:
            return
        sequence = known
        # Said first: should giving back fail, the request has its answer all the same.
        self._emit(sequence, tokens, finish)
        self.scheduler.release(sequence)
        self.admission.release(sequence)

    def _deliver(self) -> None:
        self.mailbox.num_waiting = self.num_waiting
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self.mailbox.deliver(outputs)
