"""The contract of a store, held to by both: many writers at once."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prefixd_store.errors import Conflict
from prefixd_store.store import Store
from tests.prefixd_store.support import ROOT, TENANT, Backend, MakeBlob, blob_of, put


def test_ping_and_close(store: Store) -> None:
    store.ping()
    store.close()


WRITER = """
import sys
from pathlib import Path
from tests.prefixd_store.support import Backend, make_blob, put
backend = Backend(sys.argv[1], {"namespace": sys.argv[2]} if sys.argv[2] else {})
store = backend.open()
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[4])):
    print(put(store, "busy", make_blob(Path(sys.argv[3]), 2000)).version.model_dump_json())
"""


def test_uploads_from_threads_and_processes_are_all_kept(
    backend: Backend, blob: MakeBlob, tmp_path: Any
) -> None:
    each = 8
    arguments = [backend.url, backend.options.get("namespace", ""), str(tmp_path), str(each)]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    stores = [backend.open(), backend.open()]
    start = threading.Barrier(4)

    def upload(store: Store) -> list[str]:
        start.wait()
        return [put(store, "busy", blob(2000)).version.model_dump_json() for _ in range(each)]

    with ThreadPoolExecutor(4) as pool:
        threads = [pool.submit(upload, stores[n % 2]) for n in range(4)]
        acknowledged = [
            line for writer in writers for line in writer.communicate("go\n")[0].splitlines()
        ]
        acknowledged += [line for thread in threads for line in thread.result()]
    assert [writer.returncode for writer in writers] == [0, 0]
    task = stores[0].get_task(TENANT, "busy")
    assert sorted(task.versions) == list(range(1, 6 * each + 1))
    assert task.revision == 6 * each
    assert sorted(acknowledged) == sorted(v.model_dump_json() for v in task.versions.values())
    for version in task.versions.values():
        assert len(stores[1].read_blob(TENANT, version.sha256)) == 2000


def test_only_one_of_many_conditional_changes_wins(backend: Backend, blob: MakeBlob) -> None:
    stores = [backend.open() for _ in range(4)]
    etag = put(stores[0], "e2e", blob()).task.etag
    start = threading.Barrier(4)

    def change(n: int) -> bool:
        start.wait()
        try:
            stores[n].update_task(TENANT, "e2e", {"description": f"{n}"}, if_match=etag)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(change, range(4)))
    assert sum(won) == 1
    assert stores[0].get_task(TENANT, "e2e").description == str(won.index(True))


def test_the_same_bytes_uploaded_at_once_are_one_version(backend: Backend, tmp_path: Any) -> None:
    stores = [backend.open() for _ in range(4)]
    uploads = [blob_of(tmp_path, b"the same" * 1000) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: put(stores[n], "e2e", uploads[n]), range(4)))
    assert sorted(result.created for result in results) == [False, False, False, True]
    assert {result.version.version for result in results} == {1}
    stores[0].collect_garbage(grace_seconds=0)
    assert stores[0].read_blob(TENANT, uploads[0].sha256) == uploads[0].data
