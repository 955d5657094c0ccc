"""Trained prefixes at rest: the file format, importers and the stores. No GPU, no torch.

A prefix is the keys and values that every layer of a frozen language model attends to ahead of the
prompt. :func:`import_checkpoint` turns what other libraries save into one checked safetensors file,
:func:`parse_prefix` reads one, a :class:`Store` keeps and versions them.
"""

from prefixd_store.arrays import DType, PrefixArray
from prefixd_store.errors import (
    Conflict,
    CorruptBlob,
    InvalidPrefix,
    InvalidRequest,
    NotFound,
    PrefixdError,
    StoreUnavailable,
    TooLarge,
    Unavailable,
)
from prefixd_store.exporters import export_peft
from prefixd_store.fingerprint import TensorSample, fingerprint_folder, fingerprint_tensors
from prefixd_store.format import (
    Limits,
    Prefix,
    PrefixManifest,
    Shape,
    leading_length,
    parse_prefix,
    read_manifest,
    validate_file,
    write_prefix,
)
from prefixd_store.geometry import Geometry, SiteGeometry, check_fits
from prefixd_store.importers import ImportResult, check_file_name, import_checkpoint
from prefixd_store.model_config import geometry_folder
from prefixd_store.records import (
    DEFAULT_TENANT,
    NAME_PATTERN,
    Event,
    Site,
    TaskRecord,
    VersionRecord,
    check_name,
    utcnow,
)
from prefixd_store.store import PutResult, Store, TaskPage, open_store

__all__ = [
    "DEFAULT_TENANT",
    "NAME_PATTERN",
    "Conflict",
    "CorruptBlob",
    "DType",
    "Event",
    "Geometry",
    "ImportResult",
    "InvalidPrefix",
    "InvalidRequest",
    "Limits",
    "NotFound",
    "Prefix",
    "PrefixArray",
    "PrefixManifest",
    "PrefixdError",
    "PutResult",
    "Shape",
    "Site",
    "SiteGeometry",
    "Store",
    "StoreUnavailable",
    "TaskPage",
    "TaskRecord",
    "TensorSample",
    "TooLarge",
    "Unavailable",
    "VersionRecord",
    "check_file_name",
    "check_fits",
    "check_name",
    "export_peft",
    "fingerprint_folder",
    "fingerprint_tensors",
    "geometry_folder",
    "import_checkpoint",
    "leading_length",
    "open_store",
    "parse_prefix",
    "read_manifest",
    "utcnow",
    "validate_file",
    "write_prefix",
]
