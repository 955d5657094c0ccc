"""Every command, in this process, against a server on a real socket."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse

import prefixd
from prefixd.cli import _server
from tests.client.conftest import Cli
from tests.client.server import TEXT, TOKENS, Server, error, zip_of

PREFIXD = [sys.executable, "-m", "prefixd"]


@pytest.fixture
def e2e(server: Server) -> Server:
    server.add_version("e2e", b"first")
    server.add_version("e2e", b"second")
    return server


def give_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


# ---------------------------------------------------------------- prefixes


def test_push(cli: Cli, server: Server, folder: Path) -> None:
    ran = cli("push", "e2e", str(folder))
    assert ran.code == 0
    assert ran.out.startswith("created e2e@1 (active): 20 virtual tokens, ")
    assert "\n" not in ran.out.rstrip("\n")
    again = cli("push", "e2e", str(folder), "--json", "--no-activate")
    assert json.loads(again.out)["created"] is False
    assert server.seen[-1].query == {"activate": "false"}
    assert cli("push", "e2e", str(folder), "--if-match", "stale").code == 1
    assert cli("push", "e2e", str(folder), "--create-only").code == 1


def test_a_length_for_each_site_is_told(cli: Cli, server: Server, folder: Path) -> None:
    server.sites = {"cross": [30, 3, 21, 64], "decoder": [30, 3, 20, 64]}
    assert "(active): 21 cross, 20 decoder virtual tokens, " in cli("push", "e2e", str(folder)).out
    for command in (["tasks"], ["show", "e2e"]):
        assert "21 cross, 20 decoder" in cli(*command).out
    server.sites["cross"] = [30, 3, 20, 64]
    assert "(active): 20 virtual tokens, " in cli("push", "e2e", str(folder)).out


def test_push_nothing(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    ran = cli("push", "e2e", str(tmp_path))
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("error: ")
    assert ran.err.endswith("found README.md\n")
    assert ran.err.count("\n") == 1


def test_compile(cli: Cli, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "faq.txt"
    text.write_text("Long é\n")
    assert cli("compile", "faq", "--text", str(text)).out.startswith("created faq@1 (active)")
    assert server.seen[-1].json == {"text": "Long é\n"}
    give_stdin(monkeypatch, "piped é".encode())
    ran = cli("compile", "faq", "--text", "-", "--no-activate", "--json")
    assert json.loads(ran.out)["active"] is False
    assert server.seen[-1].json == {"text": "piped é"}
    give_stdin(monkeypatch, b"ab\xff")
    assert cli("compile", "faq", "--text", "-").err == "error: stdin is not UTF-8: byte 0xff at 2\n"
    missing = cli("compile", "faq", "--text", str(tmp_path / "nope"))
    assert (missing.code, missing.err.count("\n")) == (1, 1)
    assert "No such file" in missing.err


def test_pull(cli: Cli, e2e: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("pull", "e2e").out == "e2e@2.safetensors\n"
    assert Path("e2e@2.safetensors").read_bytes() == b"second"
    assert cli("pull", "e2e@1", "--out", "first.safetensors").code == 0
    assert Path("first.safetensors").read_bytes() == b"first"
    e2e.zip = zip_of({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    assert cli("pull", "e2e@1", "--format", "peft").out == "e2e@1\n"
    assert sorted(path.name for path in Path("e2e@1").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    e2e.blobs[e2e.tasks["e2e"]["versions"][1]] = b"damaged"
    ran = cli("pull", "e2e@1", "--out", "damaged")
    assert ran.code == 1
    assert "SHA-256" in ran.err
    assert not Path("damaged").exists()


# ---------------------------------------------------------------- generate


def test_generate_streams(cli: Cli, e2e: Server) -> None:
    ran = cli(
        *("generate", "e2e@1", "hi", "--max-new-tokens", "4", "--temperature", "0.5"),
        *("--top-p", "0.9", "--top-k", "3", "--seed", "7", "--stop", "a", "--stop", "b"),
        *("--param", 'logit_bias={"42": 1}', "--param", "ignore_eos=true"),
    )
    assert ran == (0, TEXT + "\n", "")
    assert e2e.seen[0].path == "/v1/tasks/e2e@1/generate"
    assert e2e.seen[0].json == {
        "inputs": "hi",
        "parameters": {
            "max_new_tokens": 4,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 3,
            "seed": 7,
            "stop": ["a", "b"],
            "logit_bias": {"42": 1},
            "ignore_eos": True,
        },
        "stream": True,
    }


def test_generate_without_stream(cli: Cli, e2e: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("generate", "e2e", "hi", "--no-stream").out == TEXT + "\n"
    give_stdin(monkeypatch, b"from a pipe\n")
    whole = json.loads(cli("generate", "e2e", "-", "--json").out)
    assert (whole["generated_text"], whole["version"]) == (TEXT, 2)
    assert e2e.seen[-1].json == {"inputs": "from a pipe\n", "parameters": {}, "stream": False}
    several = cli("generate", "e2e", "hi", "--no-stream", "--param", "n=2")
    assert several.out == f"{TEXT} 0\n{TEXT} 1\n"


def test_generate_with_beams_is_not_streamed(cli: Cli, e2e: Server) -> None:
    found = cli("generate", "e2e", "hi", "--num-beams", "4", "--param", "n=2")
    assert found.out == f"{TEXT} 0\n{TEXT} 1\n"
    parameters = {"num_beams": 4, "n": 2}
    assert e2e.seen[-1].json == {"inputs": "hi", "parameters": parameters, "stream": False}
    assert cli("generate", "e2e", "hi", "--num-beams", "1").out == TEXT + "\n"
    assert e2e.seen[-1].json["stream"] is True


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_generate_details(cli: Cli, e2e: Server, stream: str) -> None:
    ran = cli("generate", "e2e", "hi", "--details", stream)
    assert ran.out.startswith(TEXT + "\n")
    assert '" café"' in ran.out
    assert ran.out.count("-0.5000") == len(TOKENS)
    assert e2e.seen[0].json["parameters"] == {"details": True}


def test_generate_json_lines(cli: Cli, e2e: Server) -> None:
    # Not splitlines(): a token holds U+2028.
    lines = cli("generate", "e2e", "hi", "--json", "--stream").out.rstrip("\n").split("\n")
    events = [json.loads(line) for line in lines]
    assert [event["token"]["text"] for event in events] == TOKENS
    assert events[-1]["usage"]["total_tokens"] == 7


def test_generate_that_breaks(cli: Cli) -> None:
    ran = cli("generate", "broken", "hi")
    assert ran == (1, " Blue\n", "error: page fault\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--param", "x"], "not KEY=JSON"),
        (["--param", "x=}"], "not KEY=JSON"),
        (["--param", "version=3"], "not a parameter"),
        (["--param", "=3"], "not a parameter"),
        (["--temperature", "hot"], "--temperature"),
        (["--nope"], "--nope"),
    ],
)
def test_generate_wrong_usage(cli: Cli, e2e: Server, args: list[str], said: str) -> None:
    ran = cli("generate", "e2e", "hi", *args)
    assert ran.code == 2
    assert said in ran.err
    assert e2e.seen == []


# ---------------------------------------------------------------- tasks


def test_tasks(cli: Cli, e2e: Server) -> None:
    for name in ("faq", "x"):
        e2e.add_version(name, name.encode())
    e2e.tasks["faq"] |= {"description": "[bold]not markup[/]", "pinned": True}
    e2e.tasks["e2e"]["split"] = {1: 0.9, 2: 0.1}
    ran = cli("tasks")
    rows = {line.split()[0]: line for line in ran.out.splitlines()}
    assert rows.keys() == {"task", "e2e", "faq", "x"}
    assert "@1 90%, @2 10%" in rows["e2e"]
    assert "[bold]not markup[/]" in rows["faq"]
    assert "yes" in rows["faq"]
    assert [task["task"] for task in json.loads(cli("tasks", "--json").out)] == ["e2e", "faq", "x"]
    assert [task["task"] for task in json.loads(cli("tasks", "--prefix", "f", "--json").out)] == [
        "faq"
    ]
    assert json.loads(cli("tasks", "--prefix", "none", "--json").out) == []


def test_show_and_versions(cli: Cli, e2e: Server) -> None:
    e2e.tasks["e2e"]["description"] = "restaurants"
    shown = cli("show", "e2e")
    assert shown.code == 0
    assert all(text in shown.out for text in ("restaurants", e2e.etag("e2e"), "@2", "device"))
    whole = json.loads(cli("show", "e2e", "--json").out)
    assert (whole["active"], whole["etag"]) == (2, e2e.etag("e2e"))
    table = cli("versions", "e2e").out
    assert all(version["sha256"][:12] in table for version in whole["versions"])
    assert json.loads(cli("versions", "e2e", "--json").out) == whole["versions"]


def test_activate(cli: Cli, e2e: Server) -> None:
    assert cli("activate", "e2e", "1") == (0, "e2e: @1\n", "")
    assert cli("activate", "e2e", "--split", "1=0.9,2=0.1").out == "e2e: @1 90%, @2 10%\n"
    assert e2e.tasks["e2e"]["split"] == {1: 0.9, 2: 0.1}
    assert "does not match" in cli("activate", "e2e", "2", "--if-match", "stale").err
    for wrong in ([], ["1", "--split", "1=1"], ["--split", "1"], ["--split", "a=1"], ["one"]):
        assert cli("activate", "e2e", *wrong).code == 2


def test_delete(cli: Cli, e2e: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    give_stdin(monkeypatch, b"")
    assert cli("delete", "e2e").code == 2  # nobody to ask
    assert "takes traffic" in cli("delete", "e2e@2", "--yes").err
    assert cli("delete", "e2e@1", "--yes").out == "deleted e2e@1\n"
    assert list(e2e.tasks["e2e"]["versions"]) == [2]
    assert cli("delete", "e2e", "-y").out == "deleted e2e\n"
    assert e2e.tasks == {}


@pytest.mark.parametrize(("answer", "kept"), [(b"y\n", False), (b"n\n", True), (b"\n", True)])
def test_delete_asks_on_a_terminal(e2e: Server, answer: bytes, kept: bool) -> None:
    terminal, its_end = pty.openpty()
    os.write(terminal, answer)
    ran = subprocess.run(
        [*PREFIXD, "delete", "e2e", "--url", e2e.url],
        stdin=its_end,
        capture_output=True,
        timeout=60,
    )
    os.close(terminal)
    os.close(its_end)
    assert ran.stderr.startswith(b"Delete e2e?")
    assert ran.returncode == (1 if kept else 0)
    assert ("e2e" in e2e.tasks) is kept


def test_info(cli: Cli) -> None:
    ran = cli("info")
    assert all(text in ran.out for text in ("9.9", "model.name", "a/model", "cache.free_pages"))
    assert json.loads(cli("info", "--json").out)["model"]["max_model_len"] == 2048


# ---------------------------------------------------------------- failures


def test_errors_are_one_line(cli: Cli, server: Server) -> None:
    server.script.append(error(422, "[red]line one\nline two[/red] " + "x" * 500))
    ran = cli("show", "e2e")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("error: [red]line one line two[/red] xxx")
    assert ran.err.endswith("(HTTP 422, some.param, request req-1)\n")
    assert ran.err.count("\n") == 1


def test_errors_of_every_kind_exit_1(cli: Cli, server: Server) -> None:
    assert "is unknown" in cli("show", "nope").err
    assert "does not match" in cli("show", "No Name").err
    assert "is not a number" in cli("pull", "e2e@x").err
    assert "connection failed" in cli("info", "--url", "http://127.0.0.1:1").err
    assert "http://" in cli("info", "--url", "localhost").err
    server.script.append(JSONResponse({}))
    assert "is this a prefixd server?" in cli("info").err


def test_the_key_is_sent(cli: Cli, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXD_API_KEY", "from-env")
    cli("info")
    cli("info", "--api-key", "given")
    keys = [seen.headers["authorization"] for seen in server.seen]
    assert keys == ["Bearer from-env", "Bearer given"]


def test_usage(cli: Cli) -> None:
    assert cli("nonsense").code == 2
    assert cli("push", "e2e").code == 2
    assert cli("--version") == (0, f"prefixd {prefixd.__version__}\n", "")
    assert "compile" in cli("--help").out


# ---------------------------------------------------------------- the process


def test_importing_the_command_is_light() -> None:
    heavy = ("torch", "transformers", "fastapi", "redis", "safetensors", "peft")
    code = f"import sys, prefixd.cli; print([m for m in {heavy!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("[]\n", "")


def test_without_the_server_package_serve_says_what_to_install() -> None:
    # None in sys.modules makes its import fail as that of a missing package does.
    code = (
        "import sys; sys.modules['prefixd_server'] = None\n"
        "from prefixd.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    for args in (["serve", "--model", "demo"], ["demo", "--port", "1"]):
        ran = subprocess.run(
            [sys.executable, "-c", code, *args],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.returncode == 1
        assert ran.stderr == "error: the server is not installed: pip install 'prefixd[server]'\n"


@pytest.mark.parametrize(
    ("missing", "mended"),
    [
        ("fastapi", True),
        ("torch", True),
        ("prefixd_server", True),
        ("prefixd_server.htpp", False),
        ("prefixd_store.records", False),
        ("prefixd._calls", False),
    ],
)
def test_only_what_an_extra_brings_is_called_missing(missing: str, mended: bool) -> None:
    assert _server.missing_extra(ModuleNotFoundError(name=missing)) is mended


def test_interrupt_exits_130(server: Server) -> None:
    running: subprocess.Popen[Any] = subprocess.Popen(
        [*PREFIXD, "generate", "endless", "hi", "--url", server.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Who starts the tests in a shell's background hands down that it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert running.stdout is not None
    assert running.stdout.read(5) == b" Blue"
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert b"Traceback" not in err
    assert server.disconnected.wait(10)
