from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from prefixd_store import (
    InvalidPrefix,
    Prefix,
    export_peft,
    import_checkpoint,
    parse_prefix,
    write_prefix,
)
from tests.prefixd_store.checkpoints import (
    GEOMETRIES,
    files_of,
    prompt_of,
    random_arrays,
    save_peft,
    tiny_model,
    to_torch,
)


def imported(folder: Path, out: Path, family: str) -> Prefix:
    import_checkpoint(files_of(folder), out, geometry=GEOMETRIES[family])
    return parse_prefix(out.read_bytes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cartridge", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_round_trip_through_peft(
    tmp_path: Path, family: str, cartridge: bool, dtype: torch.dtype
) -> None:
    saved = save_peft(tmp_path / "saved", family=family, dtype=dtype, cartridge=cartridge)
    first = imported(tmp_path / "saved", tmp_path / "1", family)
    export_peft(first, tmp_path / "exported")
    second = imported(tmp_path / "exported", tmp_path / "2", family)
    assert second.manifest.source_format == first.manifest.source_format
    for name, array in first.arrays.items():
        assert array.data.tobytes() == second.arrays[name].data.tobytes()

    base = tiny_model(family).to(dtype).eval()
    loaded = PeftModel.from_pretrained(base, tmp_path / "exported", autocast_adapter_dtype=False)
    for ours, theirs in zip(prompt_of(loaded), prompt_of(saved), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    prompt = torch.tensor([[5, 9, 2]])
    tokens = [
        model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
        for model in (loaded, saved)
    ]
    assert torch.equal(*tokens)


def test_a_prefix_that_peft_never_saw(tmp_path: Path) -> None:
    write_prefix(
        tmp_path / "p",
        random_arrays((3, 2, 5, 16)),
        query_offset=5,
        base_model="acme/tiny",
        source_format="peft/cartridge",
        provenance={"num_frozen_tokens": 10**6},
    )
    prefix = parse_prefix((tmp_path / "p").read_bytes())
    export_peft(prefix, tmp_path / "deep" / "folder")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "deep" / "folder")
    assert loaded.active_peft_config.base_model_name_or_path == "acme/tiny"
    for part, theirs in zip(("key", "value"), prompt_of(loaded), strict=True):
        assert torch.equal(to_torch(prefix.arrays[f"decoder.{part}"]), theirs)


@pytest.mark.parametrize(
    ("sites", "offset", "message"),
    [
        (("decoder", "encoder"), 5, "this one has decoder, encoder"),
        (("decoder",), 0, "has it at 0"),
    ],
)
def test_what_peft_cannot_hold(tmp_path: Path, sites: Any, offset: int, message: str) -> None:
    write_prefix(tmp_path / "p", random_arrays(sites=sites), query_offset=offset)
    with pytest.raises(InvalidPrefix, match=message):
        export_peft(parse_prefix((tmp_path / "p").read_bytes()), tmp_path / "out")
    assert not (tmp_path / "out").exists()
