"""Does a prefix fit the frozen LM? Shapes must agree exactly, and fingerprints where it has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from prefixd_store.errors import InvalidPrefix
from prefixd_store.manifest import PrefixManifest
from prefixd_store.records import Site

__all__ = ["Geometry", "SiteGeometry", "check_fits"]


class SiteGeometry(NamedTuple):
    """What a prefix must look like where it goes: [num_layers, num_kv_heads, P, head_dim]."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Geometry:
    """The KV geometry of a frozen LM: its decoder's, the same in all layers, and its encoder's."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int | None = None
    """position ids that the model can take; None: no limit"""
    encoder: SiteGeometry | None = None
    """None: a decoder-only model"""
    encoder_starts_at_zero: bool = False
    """the encoder's positions are absolute and begin at 0, whatever a prefix says"""

    @property
    def has_encoder(self) -> bool:
        return self.encoder is not None

    @property
    def num_kv_layers(self) -> int:
        """How many layers of KV memory a token takes, whatever its site."""
        return max(site.num_layers for site in self.sites.values())

    @property
    def decoder(self) -> SiteGeometry:
        return SiteGeometry(self.num_layers, self.num_kv_heads, self.head_dim)

    @property
    def sites(self) -> dict[Site, SiteGeometry]:
        """Every site the model has. Cross-attention is the decoder's, and has its shape."""
        if self.encoder is None:
            return {"decoder": self.decoder}
        return {"decoder": self.decoder, "encoder": self.encoder, "cross": self.decoder}


def check_fits(manifest: PrefixManifest, geometry: Geometry, fingerprint: str | None) -> bool:
    """Raise :class:`InvalidPrefix` unless the prefix fits the model of that geometry.

    ``fingerprint`` is the model's own. Returns True when the prefix carries the same one, False
    when it cannot be compared. A different one is refused.
    """
    _check_sites(manifest, geometry)
    for site, (layers, heads, tokens, dim) in manifest.sites.items():
        wanted = geometry.sites[site]
        if (layers, heads, dim) != wanted:
            raise InvalidPrefix(
                f"the {site} tensors are [L={layers}, H_kv={heads}, P={tokens}, D={dim}] but the "
                f"model takes [L={wanted[0]}, H_kv={wanted[1]}, P, D={wanted[2]}]",
                param=f"{site}.key",
            )
    if geometry.encoder_starts_at_zero and "encoder" in manifest.sites and manifest.query_offset:
        raise InvalidPrefix(
            f"an encoder prefix with query offset {manifest.query_offset}: the positions of this"
            " model's encoder begin at 0, so the offset must be 0",
            param="query_offset",
        )
    _check_room(manifest, geometry)
    if manifest.base_fingerprint is None or fingerprint is None:
        return False
    if manifest.base_fingerprint != fingerprint:
        raise InvalidPrefix(
            f"the prefix was trained on another model: its base fingerprint is "
            f"{manifest.base_fingerprint}, this model's is {fingerprint}",
            param="base_fingerprint",
        )
    return True


def _check_sites(manifest: PrefixManifest, geometry: Geometry) -> None:
    if not manifest.sites.keys() <= geometry.sites.keys():
        found = ", ".join(sorted(manifest.sites))
        raise InvalidPrefix(
            f"the prefix has tensors for {found}; a decoder-only model takes decoder alone"
        )


def _check_room(manifest: PrefixManifest, geometry: Geometry) -> None:
    limit = geometry.max_positions
    if limit is not None and manifest.query_offset >= limit:
        raise InvalidPrefix(
            f"{manifest.num_virtual_tokens} virtual tokens leave no room for a prompt: the first "
            f"prompt token is at position {manifest.query_offset}, the model has {limit}",
            param="num_virtual_tokens",
        )
