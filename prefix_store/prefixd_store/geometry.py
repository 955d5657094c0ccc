"""Does a prefix fit the frozen LM? Shapes must agree exactly, and fingerprints where it has one."""

from __future__ import annotations

from dataclasses import dataclass

from prefixd_store.errors import InvalidPrefix
from prefixd_store.manifest import PrefixManifest
from prefixd_store.records import Site

__all__ = ["Geometry", "check_fits"]


@dataclass(frozen=True)
class Geometry:
    """The KV geometry of a frozen LM (its decoder's), the same in all its layers."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int | None = None
    """position ids that the model can take; None: no limit"""
    has_encoder: bool = False
    num_encoder_layers: int | None = None
    """None: as many as the decoder's"""

    @property
    def num_kv_layers(self) -> int:
        """How many layers of KV memory a token takes, whatever its site."""
        return max(self.num_layers, self.num_encoder_layers or 0)

    def layers_of(self, site: Site) -> int:
        """How many layers take a prefix at ``site``."""
        if site == "encoder" and self.num_encoder_layers is not None:
            return self.num_encoder_layers
        return self.num_layers


def check_fits(manifest: PrefixManifest, geometry: Geometry, fingerprint: str | None) -> bool:
    """Raise :class:`InvalidPrefix` unless the prefix fits the model of that geometry.

    ``fingerprint`` is the model's own. Returns True when the prefix carries the same one, False
    when it cannot be compared. A different one is refused.
    """
    _check_sites(manifest, geometry)
    for site, (layers, heads, tokens, dim) in manifest.sites.items():
        wanted = (geometry.layers_of(site), geometry.num_kv_heads, geometry.head_dim)
        if (layers, heads, dim) != wanted:
            raise InvalidPrefix(
                f"the {site} tensors are [L={layers}, H_kv={heads}, P={tokens}, D={dim}] but the "
                f"model takes [L={wanted[0]}, H_kv={wanted[1]}, P, D={wanted[2]}]",
                param=f"{site}.key",
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
    if not geometry.has_encoder and manifest.sites.keys() != {"decoder"}:
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
