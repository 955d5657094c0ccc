"""Where a prefix starts from: words, a document, another prefix. Random is the module's own.

The LM's own activations of real words are a better start than random values, most of all with
little data (the paper, section 7.4); of a document they are where a cartridge starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from prefixd_store import InvalidPrefix, parse_prefix, validate_file
from prefixd_train.attention import AttentionPlan, LayerOptions, Role
from prefixd_train.lm import FrozenLM
from prefixd_train.sites import PrefixKV, Site

__all__ = [
    "RecordingPlan",
    "activations_of_tokens",
    "from_prefix_file",
    "from_text",
    "from_tokens",
    "from_words",
    "record_activations",
]

Choose = Literal["first", "even"]


class RecordingPlan(AttentionPlan):
    """Keeps each layer's keys and values of the batch's one row, without the prefix's."""

    def __init__(self, prefix: PrefixKV | None = None, *, query_offset: int = 0) -> None:
        super().__init__(prefix or {}, query_offset=query_offset)
        self.kv: dict[Site, dict[int, tuple[Tensor, Tensor]]] = {}

    def observe(self, role: Role, key: Tensor, value: Tensor, options: LayerOptions) -> None:
        self.kv.setdefault(role.site, {})[role.layer] = (key[0], value[0])

    def recorded(self) -> dict[Site, tuple[Tensor, Tensor]]:
        """site -> keys and values [L, H_kv, K, D]"""
        return {
            site: (
                torch.stack([layers[i][0] for i in sorted(layers)]),
                torch.stack([layers[i][1] for i in sorted(layers)]),
            )
            for site, layers in self.kv.items()
        }


def record_activations(lm: FrozenLM, **arguments: Any) -> dict[Site, tuple[Tensor, Tensor]]:
    """Run one row through the LM (without its output layer); keys and values [L, H_kv, K, D] of all
    its sites. Gradients flow where the arguments require them."""
    plan = RecordingPlan()
    with plan.active():
        lm.module.base_model(**arguments, use_cache=False)
    return plan.recorded()


@torch.no_grad()
def activations_of_tokens(
    lm: FrozenLM, tokens: Sequence[int], *, positions: Sequence[int] | None = None
) -> PrefixKV:
    """The LM's own keys and values of these tokens at every site it has.

    They stand at positions 0, 1, ... unless ``positions`` of a decoder-only LM says otherwise. Both
    sides of an encoder-decoder read the tokens; the cross-attention's are of what its encoder makes
    of them. Raises ValueError beyond the LM's positions.
    """
    if not tokens:
        raise ValueError("there are no tokens to take activations of")
    if lm.max_positions is not None and len(tokens) > lm.max_positions and positions is None:
        raise ValueError(f"{len(tokens)} tokens; the LM has {lm.max_positions} positions")
    ids = torch.tensor([list(tokens)], device=lm.device)
    if lm.is_encoder_decoder:
        return record_activations(lm, input_ids=ids, decoder_input_ids=ids)
    places = torch.tensor([positions or range(len(tokens))], device=lm.device)
    return record_activations(lm, input_ids=ids, position_ids=places)


def from_words(lm: FrozenLM, words: str, lengths: Mapping[Site, int]) -> PrefixKV:
    """Activations of ``words``, repeated or cut to P tokens (the paper's initialisation)."""
    tokens = lm.tokenizer(words, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise ValueError(f"the words {words!r} have no tokens")
    return _at_each_site(
        lengths, lambda length: activations_of_tokens(lm, list(islice(cycle(tokens), length)))
    )


def from_text(
    lm: FrozenLM, text: str, lengths: Mapping[Site, int], *, choose: Choose = "first"
) -> PrefixKV:
    """Activations of a text, with the tokenizer's own special tokens. See :func:`from_tokens`."""
    return from_tokens(lm, lm.tokenizer(text)["input_ids"], lengths, choose=choose)


def from_tokens(
    lm: FrozenLM,
    tokens: Sequence[int],
    lengths: Mapping[Site, int],
    *,
    choose: Choose = "first",
) -> PrefixKV:
    """Activations of P of a text's tokens.

    ``first``: of its first P tokens, which is the LM with that text in its context. ``even``: of P
    tokens, evenly chosen from all of them after the LM read the whole. A chosen token's position
    must be its place in the prefix, so the text is read with its positions compressed: the tokens
    up to the next chosen one share its position. Each site has its own P. Raises ValueError for a
    text shorter than P.
    """
    longest = max(lengths.values())
    if len(tokens) < longest:
        raise ValueError(f"the text has {len(tokens)} tokens; the prefix takes {longest}")
    if choose == "first":
        return _at_each_site(lengths, lambda length: activations_of_tokens(lm, tokens[:length]))
    return _at_each_site(lengths, lambda length: _evenly_chosen(lm, tokens, length))


def _evenly_chosen(lm: FrozenLM, tokens: Sequence[int], length: int) -> PrefixKV:
    chosen = [-(-place * len(tokens) // length) for place in range(length)]
    positions = None
    if not lm.is_encoder_decoder:
        positions = [index * length // len(tokens) for index in range(len(tokens))]
    found = activations_of_tokens(lm, tokens, positions=positions)
    return {
        site: (keys[:, :, chosen], values[:, :, chosen]) for site, (keys, values) in found.items()
    }


def from_prefix_file(lm: FrozenLM, path: Path) -> PrefixKV:
    """The values of a prefix file. Raises ValueError for a broken file, and for one that another
    LM's fingerprint is in; OSError."""
    try:
        validate_file(path)
        prefix = parse_prefix(path.read_bytes())
    except InvalidPrefix as error:
        raise ValueError(f"not a prefix: {error}") from error
    theirs = prefix.manifest.base_fingerprint
    if theirs is not None and lm.fingerprint is not None and theirs != lm.fingerprint:
        raise ValueError(
            f"trained on another model: its base fingerprint is {theirs}, that of {lm.name} is"
            f" {lm.fingerprint}"
        )

    def tensor(site: Site, part: str) -> Tensor:
        # Copied: the array is a read-only view of the file.
        array = prefix.arrays[f"{site}.{part}"].to_float32().copy()
        return torch.from_numpy(array).to(lm.device)

    return {site: (tensor(site, "key"), tensor(site, "value")) for site in prefix.manifest.sites}


def _at_each_site(
    lengths: Mapping[Site, int], activations: Callable[[int], PrefixKV]
) -> dict[Site, tuple[Tensor, Tensor]]:
    # What an encoder makes of a token depends on all that it reads, so each length is read alone.
    found = {length: activations(length) for length in set(lengths.values())}
    return {site: found[length][site] for site, length in lengths.items()}
