"""convert: any known checkpoint as one prefixd file, made here and sent nowhere."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from prefixd import CheckpointError, InvalidArgumentError, ModelInfo
from prefixd._checkpoint import files_to_send
from prefixd._transport import DEFAULT_URL
from prefixd.cli._shared import ApiKey, connect, stdout
from prefixd_store import (
    Geometry,
    ImportResult,
    SiteGeometry,
    fingerprint_folder,
    geometry_folder,
    import_checkpoint,
)
from prefixd_store import PrefixdError as StoreError

__all__ = ["register"]

Base = Annotated[
    str,
    typer.Option(
        "--base",
        envvar="PREFIXD_URL",
        help="The frozen model: a folder with its config.json, or a server that serves it.",
    ),
]


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A checkpoint: a folder, or one file of weights.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    base: Base = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Write a checkpoint as one prefixd file, and say what was recognised."""
    if not source.exists():
        raise CheckpointError(f"{source} does not exist")
    try:
        geometry, fingerprint = _described(base, api_key)
        result = _convert(source, out, geometry, fingerprint)
    except StoreError as error:
        raise CheckpointError(error.message) from error
    for line in _report(result):
        stdout.print(line, markup=False, soft_wrap=True)
    stdout.print(f"wrote {out}: sha256 {result.sha256}", markup=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    app.command()(convert)


def _convert(source: Path, out: Path, geometry: Geometry, fingerprint: str | None) -> ImportResult:
    # A file that is there already is replaced by a good one or not touched.
    partial = out.with_name(f".{out.name}.partial")
    with tempfile.TemporaryDirectory(prefix="prefixd-") as scratch:
        single = source.suffix == ".safetensors" and source.is_file()
        files = [source] if single else files_to_send(source, Path(scratch))
        named = {file.name: file for file in files}
        result = import_checkpoint(named, partial, geometry=geometry, fingerprint=fingerprint)
    partial.replace(out)
    return result


def _described(base: str, api_key: str | None) -> tuple[Geometry, str | None]:
    if not base.startswith(("http://", "https://")):
        folder = Path(base).expanduser()
        has_weights = any(folder.glob("*.safetensors"))
        return geometry_folder(folder), fingerprint_folder(folder) if has_weights else None
    with connect(base, api_key) as client:
        model = client.info().model
    return _geometry(model), model.fingerprint


def _geometry(model: ModelInfo) -> Geometry:
    if model.num_layers is None or model.num_kv_heads is None or model.head_dim is None:
        raise InvalidArgumentError("the server does not tell its model's layers and heads")
    encoder = None
    if model.encoder is not None:
        encoder = SiteGeometry(
            model.encoder.num_layers, model.encoder.num_kv_heads, model.encoder.head_dim
        )
    return Geometry(
        model.num_layers,
        model.num_kv_heads,
        model.head_dim,
        max_positions=model.max_model_len,
        encoder=encoder,
    )


def _report(result: ImportResult) -> list[str]:
    manifest = result.manifest
    lines = [f"recognised {result.recognised}"]
    lines += [
        f"{site}: [L={layers}, H_kv={heads}, P={tokens}, D={dim}] {manifest.dtype}"
        for site, (layers, heads, tokens, dim) in sorted(manifest.sites.items())
    ]
    lines.append(f"query offset {manifest.query_offset}")
    if manifest.base_model:
        lines.append(f"trained on {manifest.base_model}, as the checkpoint says")
    lines.append(
        "the model's fingerprint is the prefix's"
        if result.verified
        else "unverified: the checkpoint has no fingerprint to compare with the model's"
    )
    return lines
