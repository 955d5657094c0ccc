"""From a request to a sequence: one immutable version, pinned, and certain to fit when alone."""

from __future__ import annotations

import random

from prefixd_server.engine.beam_group import most_pages
from prefixd_server.engine.sequence import Sequence
from prefixd_server.errors import InvalidRequest, PromptTooLong
from prefixd_server.kv.allocator import PageAllocator, pages_for
from prefixd_server.models.seq2seq import DecoderRules
from prefixd_server.prefix.entry import num_prefix_pages
from prefixd_server.prefix.registry import Registry
from prefixd_server.prefix.residency import Residency
from prefixd_server.types import EngineRequest, PrefixVersion

__all__ = ["Admission"]


class Admission:
    def __init__(
        self,
        registry: Registry,
        residency: Residency,
        allocator: PageAllocator,
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        decoder_rules: DecoderRules | None = None,
    ) -> None:
        """``decoder_rules``: of an encoder-decoder, whose encoder then gets the prompts."""
        self.registry = registry
        self.residency = residency
        self.allocator = allocator
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.decoder_rules = decoder_rules

    def admit(self, request: EngineRequest) -> Sequence:
        """Resolve and pin. Raises NotFound, PromptTooLong, InvalidRequest, with nothing pinned."""
        if self.decoder_rules is not None:
            return self._admit_encoder_decoder(request, self.decoder_rules)
        prefix = self._resolve(request)
        prompt = request.prompt_token_ids
        if prefix is not None and prefix.starts_sequence:
            # Never to nothing: a prompt needs one token whose logits predict the first new one.
            prompt = prompt[min(request.leading_special_tokens, len(prompt) - 1) :]
        self._check_fits(request, prompt, prefix)
        if prefix is not None:
            self.residency.pin(prefix)
        return Sequence(request, prompt, prefix)

    def _admit_encoder_decoder(self, request: EngineRequest, rules: DecoderRules) -> Sequence:
        _check_meaningful(request)
        prefix = self._resolve(request)
        text = request.prompt_token_ids
        if len(text) > self.max_model_len:
            raise PromptTooLong(
                f"{len(text)} prompt tokens; the model's encoder takes {self.max_model_len}",
                param="inputs",
            )
        self._check_fits(request, (rules.start,), prefix, num_encoder_tokens=len(text))
        if prefix is not None:
            self.residency.pin(prefix)
        return Sequence(
            request,
            (rules.start,),
            prefix,
            encoder_token_ids=text,
            forced_first=rules.first,
            forced_last=rules.last,
            banned_token_ids=rules.never,
        )

    def release(self, sequence: Sequence) -> None:
        if sequence.prefix is not None:
            self.residency.unpin(sequence.prefix.key)

    def _resolve(self, request: EngineRequest) -> PrefixVersion | None:
        if request.task is None:
            return None
        return self.registry.resolve(
            request.tenant, request.task, request.version, draw=random.random()
        )

    def _check_fits(
        self,
        request: EngineRequest,
        prompt: tuple[int, ...],
        prefix: PrefixVersion | None,
        num_encoder_tokens: int = 0,
    ) -> None:
        new, beams = request.sampling.max_new_tokens, request.sampling.beams
        num_beams = beams.num_beams if beams else 1
        self._check_width(num_beams)
        offset = prefix.decoder_offset if prefix else 0
        if offset + len(prompt) + new > self.max_model_len:
            raise PromptTooLong(
                f"{len(prompt)} prompt tokens, {new} new tokens and {offset} virtual tokens make"
                f" {offset + len(prompt) + new}; the model's context is {self.max_model_len}",
                param="inputs",
            )
        size = self.allocator.page_size
        prefix_pages = num_prefix_pages(prefix, size) if prefix else 0
        # At worst the beams have no more than the prompt in common.
        own_pages = most_pages(len(prompt), len(prompt) + new, num_beams, size)
        needed = prefix_pages + pages_for(num_encoder_tokens, size) + own_pages
        if needed > self.allocator.num_pages:
            raise InvalidRequest(
                f"the request needs {needed} pages of KV memory; the server has"
                f" {self.allocator.num_pages}",
                param="parameters.max_new_tokens",
            )

    def _check_width(self, num_beams: int) -> None:
        """All beams run in one step."""
        limits = {
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
        }
        for name, limit in limits.items():
            if num_beams > limit:
                raise InvalidRequest(
                    f"num_beams is {num_beams}; the server's {name} is {limit}",
                    param="parameters.num_beams",
                )


def _check_meaningful(request: EngineRequest) -> None:
    if request.capture_kv:
        raise InvalidRequest(
            "a text cannot be compiled into a prefix of an encoder-decoder: what its encoder makes"
            " of a text depends on the text that follows",
            param="text",
        )
    if request.sampling.prompt_logprobs:
        raise InvalidRequest(
            "an encoder-decoder gives its prompt no log-probabilities",
            param="parameters.decoder_input_details",
        )
