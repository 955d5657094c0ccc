"""A server with the shapes of docs/api.md on a real socket, which also misbehaves on request.

It keeps tasks in memory and has no model: what it generates is fixed. ``script`` holds answers for
the next requests, and the tasks in ``STREAMS`` break their streams in one way each.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import socket
import threading
import zipfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

TOKENS = [" Blue", " Spice", "\u2028is", " café"]
TEXT = "".join(TOKENS)
NOW = "2026-01-31T12:00:00Z"


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    parts: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    body = {"message": message, "type": "some_error", "code": "some_code", "param": "some.param"}
    return JSONResponse({"error": body}, status, {"x-request-id": "req-1", **(headers or {})})


class Server:
    def __init__(self) -> None:
        self.reset()
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(self._app(), log_level="critical", lifespan="off", access_log=False)
        )
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._uvicorn.run, args=([self._socket],))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> Server:
        self.start()
        return self

    def start(self) -> None:
        self._socket.listen()  # connections wait in the backlog until uvicorn is up
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self._uvicorn.should_exit = True
        self._uvicorn.force_exit = True
        self._thread.join(10)
        self._socket.close()

    # ------------------------------------------------------------------ state

    def reset(self) -> None:
        self.script: deque[Response] = deque()
        self.seen: list[Seen] = []
        self.tasks: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.zip: bytes | None = None
        self.sites = {"decoder": [30, 3, 20, 64]}
        self.ready = "ready"
        self.disconnected = threading.Event()

    def add_version(self, task: str, data: bytes, *, active: bool = True) -> dict[str, Any]:
        record = self.tasks.setdefault(
            task, {"versions": {}, "split": {}, "description": "", "pinned": False, "defaults": {}}
        )
        number = max(record["versions"], default=0) + 1
        sha256 = hashlib.sha256(data).hexdigest()
        record["versions"][number] = sha256
        self.blobs[sha256] = data
        if active or number == 1:
            record["split"] = {number: 1.0}
        return self.upload_answer(task, number)

    def upload_answer(self, task: str, number: int) -> dict[str, Any]:
        version = self.version(task, number)
        keys = ("task", "version", "sha256", "num_virtual_tokens", "sites", "format", "bytes")
        told = {key: version[key] for key in (*keys, "created_at")}
        return told | {"active": version["weight"] > 0}

    def version(self, task: str, number: int) -> dict[str, Any]:
        record = self.tasks[task]
        sha256 = record["versions"][number]
        return {
            "task": task,
            "version": number,
            "sha256": sha256,
            "num_virtual_tokens": 20,
            "query_offset": 20,
            "sites": self.sites,
            "dtype": "float32",
            "format": "peft/prefix_tuning",
            "bytes": len(self.blobs[sha256]),
            "base_fingerprint": None,
            "base_model": "a/model",
            "verified": False,
            "provenance": {},
            "created_at": NOW,
            "weight": record["split"].get(number, 0.0),
            "residency": "device",
            "a_field_of_the_future": True,
        }

    def task(self, name: str) -> dict[str, Any]:
        record = self.tasks[name]
        return {
            "task": name,
            "description": record["description"],
            "pinned": record["pinned"],
            "defaults": record["defaults"],
            "active": max(record["split"], default=None),
            "split": {str(number): weight for number, weight in record["split"].items()},
            "versions": [self.version(name, number) for number in record["versions"]],
            "requests_running": 0,
            "created_at": NOW,
            "updated_at": NOW,
        }

    def etag(self, name: str) -> str:
        digest = hashlib.sha256(json.dumps(self.task(name), sort_keys=True).encode())
        return f'"{digest.hexdigest()[:8]}"'

    # ------------------------------------------------------------------ HTTP

    def _app(self) -> Starlette:
        task = "/v1/tasks/{task}"
        return Starlette(
            routes=[
                self._route("/livez", "GET", self._live),
                self._route("/readyz", "GET", self._ready),
                self._route("/metrics", "GET", self._metrics),
                self._route("/v1/info", "GET", self._info),
                self._route("/v1/tasks", "GET", self._list),
                self._route(task, "GET", self._show),
                self._route(task, "PATCH", self._patch),
                self._route(task, "DELETE", self._delete),
                self._route(task + "/prefix", "PUT", self._upload),
                self._route(task + "/compile", "POST", self._compile),
                self._route(task + "/activate", "POST", self._activate),
                self._route(task + "/generate", "POST", self._generate),
                self._route(task + "/versions/{version:int}", "GET", self._version),
                self._route(task + "/versions/{version:int}", "DELETE", self._delete_version),
                self._route(task + "/versions/{version:int}/prefix", "GET", self._download),
            ]
        )

    def _route(
        self, path: str, method: str, handler: Callable[[Request, Seen], Awaitable[Response]]
    ) -> Route:
        async def endpoint(request: Request) -> Response:
            seen = Seen(
                request.method,
                request.url.path,
                dict(request.query_params),
                dict(request.headers),
                b"" if _is_multipart(request) else await request.body(),
            )
            if _is_multipart(request):
                form = await request.form()
                seen.parts = [(str(f.filename), await f.read()) for f in form.getlist("file")]  # type: ignore[union-attr]
            self.seen.append(seen)
            if self.script:
                return self.script.popleft()
            task = request.path_params.get("task", "").partition("@")[0]
            makes_tasks = method == "PUT" or path.endswith("/compile") or task in STREAMS
            if task and task not in self.tasks and not makes_tasks:
                return error(404, f"task {task!r} is unknown")
            return self._stale(task, seen) or await handler(request, seen)

        return Route(path, endpoint, methods=[method])

    def _stale(self, task: str, seen: Seen) -> Response | None:
        wanted = seen.headers.get("if-match")
        if wanted not in (None, "*") and (task not in self.tasks or self.etag(task) != wanted):
            return error(409, f"If-Match {wanted} does not match")
        if seen.headers.get("if-none-match") == "*" and task in self.tasks:
            return error(409, f"task {task!r} exists")
        return None

    async def _live(self, request: Request, seen: Seen) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request, seen: Seen) -> Response:
        return JSONResponse({"status": self.ready}, 200 if self.ready == "ready" else 503)

    async def _metrics(self, request: Request, seen: Seen) -> Response:
        return PlainTextResponse("prefixd_swaps_total 3\n")

    async def _info(self, request: Request, seen: Seen) -> Response:
        model = {"name": "a/model", "fingerprint": "abc", "num_layers": 30, "max_model_len": 2048}
        cache = {"page_size": 16, "num_pages": 100, "free_pages": 90}
        limits = {"max_upload_bytes": 1 << 30}
        return JSONResponse({"version": "9.9", "model": model, "limits": limits, "cache": cache})

    async def _list(self, request: Request, seen: Seen) -> Response:
        limit, cursor = int(seen.query["limit"]), seen.query.get("cursor", "")
        prefix = seen.query.get("prefix", "")
        names = sorted(name for name in self.tasks if name.startswith(prefix) and name > cursor)
        page = names[: min(limit, 2)]  # small pages, so that three tasks need two
        more = page[-1] if len(names) > len(page) else None
        return JSONResponse({"tasks": [self.task(name) for name in page], "next_cursor": more})

    def _task_answer(self, name: str) -> Response:
        return JSONResponse(self.task(name), headers={"etag": self.etag(name)})

    async def _show(self, request: Request, seen: Seen) -> Response:
        return self._task_answer(request.path_params["task"])

    async def _patch(self, request: Request, seen: Seen) -> Response:
        self.tasks[request.path_params["task"]].update(seen.json)
        return self._task_answer(request.path_params["task"])

    async def _delete(self, request: Request, seen: Seen) -> Response:
        del self.tasks[request.path_params["task"]]
        return Response(status_code=204)

    async def _upload(self, request: Request, seen: Seen) -> Response:
        task, data = request.path_params["task"], seen.body or b"".join(d for _, d in seen.parts)
        known = self.tasks.get(task, {"versions": {}})["versions"]
        for number, sha256 in known.items():
            if sha256 == hashlib.sha256(data).hexdigest():
                return JSONResponse(self.upload_answer(task, number), 200)
        active = seen.query["activate"] == "true"
        return JSONResponse(self.add_version(task, data, active=active), 201)

    async def _compile(self, request: Request, seen: Seen) -> Response:
        active = seen.query["activate"] == "true"
        data = seen.json["text"].encode()
        return JSONResponse(self.add_version(request.path_params["task"], data, active=active), 201)

    async def _activate(self, request: Request, seen: Seen) -> Response:
        name, body = request.path_params["task"], seen.json
        split = body.get("split") or {body["version"]: 1.0}
        self.tasks[name]["split"] = {int(number): weight for number, weight in split.items()}
        return self._task_answer(name)

    async def _version(self, request: Request, seen: Seen) -> Response:
        number = request.path_params["version"]
        if number not in self.tasks[request.path_params["task"]]["versions"]:
            return error(404, f"version {number} is unknown")
        return JSONResponse(self.version(request.path_params["task"], number))

    async def _delete_version(self, request: Request, seen: Seen) -> Response:
        record = self.tasks[request.path_params["task"]]
        if record["split"].get(request.path_params["version"]):
            return error(409, "the version takes traffic")
        del record["versions"][request.path_params["version"]]
        return Response(status_code=204)

    async def _download(self, request: Request, seen: Seen) -> Response:
        version = self.version(request.path_params["task"], request.path_params["version"])
        if seen.query["format"] == "prefixd":
            return Response(self.blobs[version["sha256"]])
        return Response(self.zip or zip_of({"adapter_config.json": b"{}"}))

    async def _generate(self, request: Request, seen: Seen) -> Response:
        name, _, number = request.path_params["task"].partition("@")
        version = int(number or max(self.tasks.get(name, {"split": {1: 1}})["split"]))
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "prefix_tokens": 20}
        end = {"task": name, "version": version, "usage": usage, "generated_text": TEXT}
        if seen.json["stream"]:
            events = STREAMS.get(name, _whole)(self, request, end)
            return StreamingResponse(events, media_type="text/event-stream")
        details = {"finish_reason": "eos_token", "generated_tokens": 4, "seed": 7, "prefill": []}
        details["tokens"] = [token(i) for i in range(len(TOKENS))]
        wanted = seen.json["parameters"].get("details")
        count = seen.json["parameters"].get("n", 1)
        sequences = [{"generated_text": f"{TEXT} {i}", "details": None} for i in range(count)]
        return JSONResponse(
            {
                **end,
                "details": details if wanted else None,
                "sequences": sequences if count > 1 else None,
            }
        )


def _is_multipart(request: Request) -> bool:
    return request.headers.get("content-type", "").startswith("multipart/form-data")


def token(index: int) -> dict[str, Any]:
    return {"id": index, "text": TOKENS[index], "logprob": -0.5, "special": False}


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return buffer.getvalue()


def event(index: int, end: dict[str, Any] | None = None) -> str:
    details = {"finish_reason": "eos_token", "generated_tokens": 4, "input_length": 3, "seed": None}
    body = {"index": index + 1, "token": token(index), "generated_text": None, "details": None}
    body |= {**end, "details": details} if end else {}
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


Events = AsyncIterator[str | bytes]


async def _whole(server: Server, request: Request, end: dict[str, Any]) -> Events:
    yield ": comment\n\n"
    for index in range(len(TOKENS)):
        last = index == len(TOKENS) - 1
        for byte in event(index, end if last else None).encode():  # cut at every possible place
            yield bytes([byte])


async def _broken(server: Server, request: Request, end: dict[str, Any]) -> Events:
    yield event(0)
    yield 'data: {"error": {"message": "page fault", "type": "server_error", "code": "x"}}\n\n'


async def _cut(server: Server, request: Request, end: dict[str, Any]) -> Events:
    yield event(0)


async def _reset(server: Server, request: Request, end: dict[str, Any]) -> Events:
    yield event(0)
    await asyncio.sleep(0.05)  # let it leave before the connection goes
    raise ConnectionResetError  # uvicorn closes the connection inside the chunked body


async def _garbled(server: Server, request: Request, end: dict[str, Any]) -> Events:
    yield event(0)
    yield "data: <html>\n\n"


async def _endless(server: Server, request: Request, end: dict[str, Any]) -> Events:
    try:
        while True:
            yield event(0)
            await asyncio.sleep(0.005)
    finally:
        server.disconnected.set()


STREAMS: dict[str, Callable[[Server, Request, dict[str, Any]], Events]] = {
    "broken": _broken,
    "cut": _cut,
    "reset": _reset,
    "garbled": _garbled,
    "endless": _endless,
}
