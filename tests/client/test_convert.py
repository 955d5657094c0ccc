"""``prefixd convert``, and every command of docs/formats.md."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from starlette.responses import JSONResponse
from transformers import BartConfig, BartForConditionalGeneration

from prefixd_store import Geometry, PrefixArray, fingerprint_folder, parse_prefix, write_prefix
from tests.client.conftest import Cli
from tests.client.server import Server
from tests.prefixd_store.checkpoints import random_arrays, save_peft, tiny_model
from tests.prefixd_store.foreign import (
    GOLDENS,
    cartridge,
    faster_transformer,
    paper_bart,
    paper_gpt2,
)

DOC = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", DOC, re.DOTALL) for line in block.splitlines()
]
BART = BartConfig(
    vocab_size=32,
    d_model=32,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for family in ("gpt2", "llama"):
        tiny_model(family).save_pretrained(tmp_path / "models" / family)
    BART.save_pretrained(tmp_path / "models" / "bart")
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def peft_bart(folder: Path) -> None:
    # PEFT counts the encoder's layers, of which this model has too few: say how many.
    task = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, num_layers=4)
    get_peft_model(BartForConditionalGeneration(BART), task).save_pretrained(folder)


def adapterhub(folder: Path) -> None:
    folder.mkdir()
    for name in ("adapter_config.json", "pytorch_adapter.bin"):
        shutil.copy(GOLDENS / "adapterhub-bart" / name, folder)


def write_all(folder: Path) -> None:
    """One checkpoint of each format, where the examples have them."""
    write_prefix(folder / "ours.safetensors", random_arrays((3, 2, 5, 16)), query_offset=5)
    save_peft(folder / "peft")
    save_peft(folder / "peft-cartridge", cartridge=True)
    peft_bart(folder / "peft-bart")
    cartridge(folder / "cache_last.pt", geometry=Geometry(3, 2, 16))
    paper_gpt2(folder / "paper-gpt2")
    paper_bart(folder / "paper-bart")
    adapterhub(folder / "adapterhub")
    faster_transformer(folder / "fastertransformer")


def test_every_command_of_the_docs(models: Path, cli: Cli, server: Server) -> None:
    write_all(models)
    converted = 0
    for line in COMMANDS:
        program, *arguments = shlex.split(line)
        assert program == "prefixd"
        ran = cli(*arguments)
        assert ran.code == 0, (line, ran.err)
        if arguments[0] == "convert":
            converted += 1
            prefix = parse_prefix(Path(arguments[2]).read_bytes())
            assert f"query offset {prefix.manifest.query_offset}\n" in ran.out
            for site, (layers, heads, tokens, dim) in prefix.manifest.sites.items():
                assert f"{site}: [L={layers}, H_kv={heads}, P={tokens}, D={dim}]" in ran.out
    assert converted == 9
    assert Path("pulled/adapter_config.json").is_file()


def test_the_report_of_the_docs(models: Path, cli: Cli) -> None:
    save_peft(models / "peft")
    ((command, shown),) = re.findall(r"```console\n\$ prefixd (.*?)\n(.*?)```", DOC, re.DOTALL)
    ran = cli(*shlex.split(command))
    assert ran.code == 0
    assert ran.out.startswith(shown)


def test_the_python_of_the_docs(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    arrays = random_arrays((3, 2, 5, 16))
    names: dict[str, Any] = {"path": tmp_path / "p", "PrefixArray": PrefixArray}
    names |= {"key": arrays["decoder.key"].data, "value": arrays["decoder.value"].data}
    exec(compile(block, "docs/formats.md", "exec"), names)
    assert parse_prefix((tmp_path / "p").read_bytes()).manifest.num_virtual_tokens == 5


def test_against_a_servers_model(models: Path, cli: Cli, server: Server) -> None:
    """The default base is the server that the other commands talk to."""
    model: dict[str, Any] = {
        "name": "tiny",
        "num_layers": 2,
        "num_kv_heads": 4,
        "head_dim": 8,
        "fingerprint": "aa",
    }
    paper_gpt2(models / "c")
    server.script.append(JSONResponse({"version": "1", "model": model}))
    ran = cli("convert", str(models / "c"), "out.safetensors")
    assert (ran.code, ran.err) == (0, "")
    assert "recognised the paper's GPT-2 checkpoint" in ran.out

    model["encoder"] = {"num_layers": 2, "num_kv_heads": 4, "head_dim": 8}
    server.script.append(JSONResponse({"version": "1", "model": model}))
    ran = cli("convert", str(models / "c"), "out.safetensors")
    assert ran.code == 1
    assert "GPT-2, a decoder-only model; this model has an encoder" in ran.err

    assert cli("convert", str(models / "c"), "out.safetensors").code == 1
    assert "does not tell its model's layers" in cli("convert", str(models / "c"), "o").err


def test_a_fingerprint_is_compared(models: Path, cli: Cli) -> None:
    base = Path("models/gpt2")
    for fingerprint, code, says in (
        (fingerprint_folder(base), 0, "the model's fingerprint is the prefix's"),
        ("bb", 1, "its base fingerprint is bb"),
    ):
        file = models / "p.safetensors"
        arrays = random_arrays((2, 4, 5, 8))
        write_prefix(file, arrays, query_offset=5, base_fingerprint=fingerprint)
        ran = cli("convert", str(file), "out.safetensors", "--base", str(base))
        assert ran.code == code
        assert says in ran.out + ran.err


@pytest.mark.parametrize(
    ("source", "base", "says"),
    [
        ("nowhere", "models/gpt2", "nowhere does not exist"),
        ("empty", "models/gpt2", "holds no prefix"),
        ("c", "models/llama", r"\[5, 128\] but the model takes"),
        ("c", "models", "cannot read models/config.json"),
        ("c", "odd", "has none of num_attention_heads"),
    ],
)
def test_a_refusal_touches_nothing(
    models: Path, cli: Cli, source: str, base: str, says: str
) -> None:
    paper_gpt2(models / "c")
    (models / "empty").mkdir()
    Path("odd").mkdir()
    Path("odd/config.json").write_text(json.dumps({"model_type": "odd"}))
    Path("out.safetensors").write_text("was here")
    before = sorted(Path().iterdir())
    ran = cli("convert", str(models / source), "out.safetensors", "--base", base)
    assert ran.code == 1
    assert re.search(says, ran.err)
    assert ran.err.count("\n") == 1
    assert sorted(Path().iterdir()) == before
    assert Path("out.safetensors").read_text() == "was here"


def test_the_same_checkpoint_gives_the_same_bytes(models: Path, cli: Cli) -> None:
    cartridge(models / "kv_cache.torch", dtype=torch.bfloat16)
    tiny = json.loads(Path("models/llama/config.json").read_text()) | {"head_dim": 8}
    Path("models/llama/config.json").write_text(json.dumps(tiny))
    for out in ("a", "b"):
        assert (
            cli("convert", str(models / "kv_cache.torch"), out, "--base", "models/llama").code == 0
        )
    assert Path("a").read_bytes() == Path("b").read_bytes()
    assert parse_prefix(Path("a").read_bytes()).manifest.dtype == "bfloat16"
