"""What is trained: modules that hold a prefix and give its keys and values.

Rows are laid out as PEFT's: one a virtual token, ``[L, 2, H_kv, D]`` flattened (2: key, value).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefixd_train.sites import SITES, PrefixKV, Site, SiteShape

__all__ = [
    "FIT_TOLERANCE",
    "DirectPrefix",
    "MLPPrefix",
    "Parameterisation",
    "PrefixParameters",
    "make_prefix",
]

log = logging.getLogger(__name__)

FIT_TOLERANCE = 1e-3
"""of an MLP to first values, relative; float32 leaves some 1e-6 where there is an exact solution"""

Parameterisation = Literal["direct", "mlp", "mlp-deep"]


class PrefixParameters(nn.Module, ABC):
    """``forward()`` gives the keys and values; dropout acts on them in training mode only."""

    lengths: Mapping[Site, int]

    @abstractmethod
    def forward(self) -> PrefixKV: ...

    @abstractmethod
    def set_kv(self, kv: PrefixKV) -> None:
        """Start from these values. Raises ValueError where sites or shapes differ."""


class _Rows(PrefixParameters):
    """All virtual tokens of a site as rows [P, W]: the frozen first ones, then the trained ones."""

    def __init__(
        self,
        shapes: Mapping[Site, SiteShape],
        lengths: Mapping[Site, int],
        *,
        dropout: float,
        frozen_first: int,
    ) -> None:
        super().__init__()
        self.lengths = dict(lengths)
        self.dropout = dropout
        self.frozen_first = frozen_first
        self._shapes = {site: shapes[site] for site in lengths}
        for site, length in lengths.items():
            layers, heads, dim = shapes[site]
            width = layers * 2 * heads * dim
            self._add_site(site, length - frozen_first, width)
            if frozen_first:
                self.register_buffer(_frozen(site), self._random_rows(site, frozen_first, width))

    @abstractmethod
    def _add_site(self, site: Site, length: int, width: int) -> None:
        """Make the parameters of ``length`` trained rows, with random values."""

    @abstractmethod
    def _random_rows(self, site: Site, length: int, width: int) -> Tensor:
        """[length, width], drawn as the trained rows are before ``set_kv``."""

    @abstractmethod
    def _trained(self, site: Site) -> Tensor: ...

    @abstractmethod
    def _set_trained(self, site: Site, rows: Tensor) -> None: ...

    def forward(self) -> PrefixKV:
        return {site: self._kv(site) for site in self.lengths}

    def _kv(self, site: Site) -> tuple[Tensor, Tensor]:
        layers, heads, dim = self._shapes[site]
        rows = F.dropout(self._trained(site), self.dropout, self.training)
        if self.frozen_first:
            rows = torch.cat([cast(Tensor, getattr(self, _frozen(site))), rows])
        # [P, L, 2, H_kv, D] -> 2 of [L, H_kv, P, D]
        keys, values = rows.view(-1, layers, 2, heads, dim).permute(2, 1, 3, 0, 4).unbind(0)
        return keys, values

    @torch.no_grad()
    def set_kv(self, kv: PrefixKV) -> None:
        if kv.keys() != self.lengths.keys():
            raise ValueError(f"values are of {_names(kv)}, the prefix has {_names(self.lengths)}")
        for site, pair in kv.items():
            layers, heads, dim = self._shapes[site]
            expected = [layers, heads, self.lengths[site], dim]
            if any(list(tensor.shape) != expected for tensor in pair):
                raise ValueError(
                    f"the {site} values are {list(pair[0].shape)} and {list(pair[1].shape)};"
                    f" the prefix takes [L, H_kv, P, D] = {expected}"
                )
            # 2 of [L, H_kv, P, D] -> [P, W]
            rows = torch.stack(tuple(pair)).permute(3, 1, 0, 2, 4).flatten(1)
            if self.frozen_first:
                cast(Tensor, getattr(self, _frozen(site))).copy_(rows[: self.frozen_first])
            self._set_trained(site, rows[self.frozen_first :])


class DirectPrefix(_Rows):
    """The rows are the parameters, drawn from N(0, 1) as PEFT's."""

    def _add_site(self, site: Site, length: int, width: int) -> None:
        self.register_parameter(site, nn.Parameter(self._random_rows(site, length, width)))

    def _random_rows(self, site: Site, length: int, width: int) -> Tensor:
        return torch.randn(length, width)

    def _trained(self, site: Site) -> Tensor:
        return cast(Tensor, getattr(self, site))

    def _set_trained(self, site: Site, rows: Tensor) -> None:
        self._trained(site).copy_(rows)


class MLPPrefix(_Rows):
    """The rows are MLP(P'), where P' is [P, hidden]: Linear, Tanh, Linear, as in the paper, and
    in the deep variant of its code Linear, Tanh, Linear, Tanh, Linear."""

    def __init__(
        self,
        shapes: Mapping[Site, SiteShape],
        lengths: Mapping[Site, int],
        *,
        hidden: int,
        middle: int,
        deep: bool = False,
        dropout: float = 0.0,
        frozen_first: int = 0,
    ) -> None:
        self.hidden = hidden
        self.middle = middle
        self.deep = deep
        super().__init__(shapes, lengths, dropout=dropout, frozen_first=frozen_first)

    def _add_site(self, site: Site, length: int, width: int) -> None:
        layers: list[nn.Module] = [nn.Linear(self.hidden, self.middle), nn.Tanh()]
        if self.deep:
            layers += [nn.Linear(self.middle, self.middle), nn.Tanh()]
        embedding = nn.Embedding(length, self.hidden)
        self.add_module(site, nn.Sequential(*layers, nn.Linear(self.middle, width)))
        self.add_module(f"{site}_input", embedding)

    @torch.no_grad()
    def _random_rows(self, site: Site, length: int, width: int) -> Tensor:
        network, _ = self._modules_of(site)
        return cast(Tensor, network(nn.Embedding(length, self.hidden).weight))

    def _trained(self, site: Site) -> Tensor:
        network, embedding = self._modules_of(site)
        return cast(Tensor, network(embedding.weight))

    def _set_trained(self, site: Site, rows: Tensor) -> None:
        """The paper fits the MLP by gradient steps. Its last layer is linear, so least squares over
        that layer is solved at once: exactly where P <= middle. Of all solutions it is the one
        nearest to the random weights. Warns where what is left is more than FIT_TOLERANCE."""
        network, embedding = self._modules_of(site)
        last = cast(nn.Linear, network[-1])
        inputs = network[:-1](embedding.weight).double()
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)  # [P, middle + 1]
        missing = rows.to(inputs) - last(network[:-1](embedding.weight)).double()
        change = torch.linalg.pinv(inputs) @ missing  # [middle + 1, W]
        last.weight.add_(change[:-1].T.to(last.weight))
        last.bias.add_(change[-1].to(last.bias))
        error = float((self._trained(site) - rows).norm() / rows.norm().clamp_min(1e-30))
        if error > FIT_TOLERANCE:
            log.warning(
                "the MLP gives the first %s values with a relative error of %.2g: it has an exact"
                " solution for up to %d virtual tokens (middle), and there are %d. A middle of %d"
                " or parameterisation 'direct' begins where it is told to",
                site,
                error,
                self.middle,
                len(rows),
                len(rows),
            )

    def _modules_of(self, site: Site) -> tuple[nn.Sequential, nn.Embedding]:
        network, embedding = getattr(self, site), getattr(self, f"{site}_input")
        return cast(nn.Sequential, network), cast(nn.Embedding, embedding)


def make_prefix(
    shapes: Mapping[Site, SiteShape],
    lengths: Mapping[Site, int],
    parameterisation: Parameterisation = "direct",
    *,
    hidden: int = 512,
    middle: int = 512,
    dropout: float = 0.0,
    frozen_first: int = 0,
) -> PrefixParameters:
    """``hidden``: the width of P'; ``middle``: of the MLP. ``frozen_first``: that many first tokens
    of each site keep the values of ``set_kv`` (Cartridges), or the random ones. Random values come
    from torch's global generator. Raises ValueError."""
    _check(shapes, lengths, dropout, frozen_first)
    ordered = {site: lengths[site] for site in SITES if site in lengths}
    if parameterisation == "direct":
        return DirectPrefix(shapes, ordered, dropout=dropout, frozen_first=frozen_first)
    if parameterisation not in get_args(Parameterisation):
        known = ", ".join(get_args(Parameterisation))
        raise ValueError(f"parameterisation {parameterisation!r} is none of {known}")
    return MLPPrefix(
        shapes,
        ordered,
        hidden=hidden,
        middle=middle,
        deep=parameterisation == "mlp-deep",
        dropout=dropout,
        frozen_first=frozen_first,
    )


def _check(
    shapes: Mapping[Site, SiteShape],
    lengths: Mapping[Site, int],
    dropout: float,
    frozen_first: int,
) -> None:
    unknown = lengths.keys() - shapes.keys()
    if unknown or not lengths:
        raise ValueError(f"sites are {_names(lengths)}; this LM has {_names(shapes)}")
    for site, length in lengths.items():
        if not 0 <= frozen_first < length:
            raise ValueError(f"frozen_first is {frozen_first} of {length} virtual tokens at {site}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")


def _frozen(site: Site) -> str:
    return f"{site}_frozen"


def _names(sites: Mapping[Site, object]) -> str:
    return ", ".join(sites) or "none"
