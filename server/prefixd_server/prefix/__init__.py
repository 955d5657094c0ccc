"""Prefixes: which one a request means, and where it is. Knows no HTTP and no model.

::

    store (Redis, disk) ── prefixd_store: bytes and records, shared by all replicas
      │ events                                       │ blobs
      ▼                                              ▼
    feed ──▶ mirror ◀── registry                   loader ◀── load_queue      threads
             records,     changes; resolve:          │ completions
             in memory    task → PrefixVersion       ▼
               │ on_change                         residency ── lifecycle     engine thread
               ▼                                     ├── entry        pins, leases, state
             references ──retire, set_pinned──▶      ├── host_cache   bytes in host memory
             hashes per tenant                       └── device_tier  pages of the KV pool

    A task's versions      belong to the store; the mirror is a copy that follows it.
    A prefix's identity    is kept alive by versions that name it and by requests that pin it.
    Host copies            belong to host_cache (or, with no room there, to residency).
    Pages of prefixes      belong to device_tier: one reference a page; requests hold leases.
"""

from prefixd_server.prefix.entry import Blocked, Lease, ResidencyObserver, Tier
from prefixd_server.prefix.feed import FeedHealth
from prefixd_server.prefix.loader import PrefixPool
from prefixd_server.prefix.references import References
from prefixd_server.prefix.registry import Registry
from prefixd_server.prefix.residency import Residency

__all__ = [
    "Blocked",
    "FeedHealth",
    "Lease",
    "PrefixPool",
    "References",
    "Registry",
    "Residency",
    "ResidencyObserver",
    "Tier",
]
