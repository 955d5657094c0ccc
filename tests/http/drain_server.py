"""A server process for the drain tests: ``python drain_server.py FOLDER DRAIN_TIMEOUT_S``.

Prints its URL when it takes requests. Sequences stop after their first token until the file
``FOLDER/go`` is there.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from prefixd_server.config import Config, HttpConfig
from prefixd_server.errors import Draining
from prefixd_server.http.logging import setup_logging
from prefixd_server.http.server import bind, serve
from tests.http.harness import EchoEngine, stack, wait_until


def main(folder: Path, drain_timeout_s: float) -> None:
    config = Config(http=HttpConfig(port=0, drain_timeout_s=drain_timeout_s, log_format="json"))
    setup_logging(config.http.log_format, config.http.log_level)
    listener = bind(config.http)
    with stack(folder, config) as parts:
        parts.engine.hold(1)
        threading.Thread(target=_release, args=(folder, parts.engine), daemon=True).start()
        serve(
            parts.app,
            parts.services,
            listener,
            on_drain=lambda: parts.mailbox.close(Draining),
            on_ready=lambda: print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True),
        )
    print("left", flush=True)


def _release(folder: Path, engine: EchoEngine) -> None:
    wait_until((folder / "go").exists, timeout=60)
    engine.release()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
