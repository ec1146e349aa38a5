"""Deferred exports: sampler weights that are sampled first and written to disk afterwards, one by one."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

log = logging.getLogger(__name__)

Export = Callable[[], None]

DELAY_SECONDS = 1.0
"""The time for which an export waits: on a CPU, exporting during the first token would double its time."""


class DeferredExports:
    """Exports, by the model of their weights. One that fails is tried again when the model is saved."""

    def __init__(self, delay_seconds: float = DELAY_SECONDS) -> None:
        self._delay = delay_seconds
        self._urgent = threading.Event()  # a save waits for them
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="deferred-export")
        self._failed: defaultdict[str, list[Export]] = defaultdict(list)  # used by the thread

    def add(self, model_id: str, export: Export, urgent: bool = False) -> None:
        """Run `export` soon, in another thread; `urgent`: as soon as the exports before it are done."""
        delay = 0.0 if urgent else self._delay
        self._thread.submit(self._try, model_id, export, time.monotonic() + delay)

    def after(self, model_id: str, size_bytes: Future[int]) -> Future[int]:
        """Return `size_bytes` once all earlier exports of the model are on disk, or raise what failed."""

        def wait() -> int:
            self._urgent.clear()
            size = size_bytes.result()  # first, because also after a failure nobody writes there any more
            for export in list(self._failed[model_id]):
                export()
                self._failed[model_id].remove(export)
            return size

        self._urgent.set()
        return self._thread.submit(wait)

    def finish(self) -> None:
        """Wait for the current exports. The weights of one that fails are still in memory."""
        self._urgent.set()
        self._thread.submit(self._urgent.clear).result()

    def forget(self, model_id: str) -> None:
        """Forget a model that is gone, with its failed exports."""
        self._thread.submit(self._failed.pop, model_id, None)

    def close(self) -> None:
        """Wait for all exports."""
        self._urgent.set()
        self._thread.shutdown()

    def _try(self, model_id: str, export: Export, due: float) -> None:
        self._urgent.wait(max(due - time.monotonic(), 0.0))
        try:
            export()
        except Exception:
            log.exception("sampler weights of %s could not be written; they are in memory", model_id)
            self._failed[model_id].append(export)
