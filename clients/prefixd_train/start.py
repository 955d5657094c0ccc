"""A prefix before its first step: its sites, its parameters, its first values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, cycle, islice

from prefixd_train.data import Examples
from prefixd_train.errors import TrainError
from prefixd_train.initialise import (
    from_prefix_file,
    from_text,
    from_tokens,
    from_words,
)
from prefixd_train.lm import FrozenLM
from prefixd_train.options import TrainOptions
from prefixd_train.parameterise import PrefixParameters, make_prefix
from prefixd_train.sites import PrefixKV, Site
from prefixd_train.text_file import read_text

__all__ = ["prefix_lengths", "start_prefix"]


def prefix_lengths(options: TrainOptions, lm: FrozenLM) -> dict[Site, int]:
    """P at each site that the prefix goes to. Raises TrainError for one that the LM lacks."""
    asked = options.asked_lengths
    known = [*lm.shapes, "all"]
    unknown = [site for site in asked if site not in known]
    if unknown:
        raise TrainError(f"sites {unknown[0]!r}: {lm.name} has {', '.join(known)}")
    lengths = {site: asked.get(site, asked.get("all")) for site in lm.shapes}
    return {site: length for site, length in lengths.items() if length is not None}


def start_prefix(
    options: TrainOptions,
    lm: FrozenLM,
    lengths: Mapping[Site, int],
    train: Examples | None,
    *,
    document: Sequence[int] | None = None,
) -> PrefixParameters:
    """Where the options name no text it starts from the tokens of ``document``, or else of
    ``train``. Random parts are drawn from torch's generator. Raises TrainError, OSError."""
    try:
        prefix = make_prefix(
            lm.shapes,
            lengths,
            options.parameterisation,
            hidden=options.hidden,
            middle=options.middle,
            dropout=options.prefix_dropout,
            frozen_first=options.num_frozen,
        )
    except ValueError as error:
        raise TrainError(str(error)) from error
    try:
        values = _first_values(options, lm, lengths, train, document)
        if values is not None:
            prefix.set_kv(values)
    except TrainError:
        raise
    except ValueError as error:
        file = options.init_from or options.init_file
        raise TrainError(f"{file}: {error}" if file else str(error)) from error
    return prefix.to(lm.device)


def _first_values(
    options: TrainOptions,
    lm: FrozenLM,
    lengths: Mapping[Site, int],
    train: Examples | None,
    document: Sequence[int] | None,
) -> PrefixKV | None:
    text = options.init_text if options.init_file is None else read_text(options.init_file)
    match options.init:
        case "random":
            return None
        case "prefix":
            assert options.init_from is not None
            return from_prefix_file(lm, options.init_from)
        case "words":
            assert text is not None
            return from_words(lm, text, lengths)
        case "text" if not options.starts_from_data:
            assert text is not None
            return from_text(lm, text, lengths, choose=options.init_choose)
    if document is not None:
        return from_tokens(lm, document, lengths, choose=options.init_choose)
    assert train is not None
    return _from_examples(lm, lengths, train)


def _from_examples(lm: FrozenLM, lengths: Mapping[Site, int], train: Examples) -> PrefixKV:
    """What the LM keeps of the first examples, one after the other: as if it were shown some."""
    tokens = chain.from_iterable(chain(*train[index]) for index in cycle(range(len(train))))
    return from_tokens(lm, list(islice(tokens, max(lengths.values()))), lengths)
