"""The thread that steps the engine: as fast as there is work, asleep when there is none."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from prefixd_server.engine.engine import Engine
from prefixd_server.errors import EngineDead

__all__ = ["EngineThread"]

log = logging.getLogger(__name__)

_LOADING_POLL_S = 0.05
"""all sequences wait for prefixes; a load that ends wakes the mailbox, deadlines need a look"""
_QUIET_S = 1.0


class EngineThread:
    def __init__(
        self,
        engine: Engine,
        *,
        on_start: Callable[[], None] = lambda: None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine = engine
        self._on_start = on_start
        self._on_death = on_death
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name="prefixd-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """End after the present step; requests still in flight end with EngineDead."""
        self._stop.set()
        self.engine.mailbox.wake()
        if self._thread.ident is not None:
            self._thread.join()

    def _idle(self) -> None:
        """Sleep until there is a command; once it has been quiet for a while, check the books."""
        if not self.engine.mailbox.wait(_QUIET_S):
            self.engine.check()
            self.engine.mailbox.wait(None)

    def _main(self) -> None:
        engine = self.engine
        try:
            self._on_start()
            while True:
                ran = engine.step()
                # Looked at after the step: the step may have drained the wake that came with it.
                if self._stop.is_set():
                    break
                if not engine.has_work:
                    self._idle()
                elif not ran:
                    engine.mailbox.wait(_LOADING_POLL_S)
        except BaseException:
            log.exception("the engine died")
            self._on_death()
        finally:
            engine.mailbox.close(EngineDead)
            engine.close(EngineDead("the engine has stopped"))
