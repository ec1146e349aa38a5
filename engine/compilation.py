"""JAX's persistent compilation cache, and a log line for every program that is compiled."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax import monitoring

from . import processor

log = logging.getLogger(__name__)

_COMPILED = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"
_WORTH_A_LINE_SECONDS = 1.0


def use_cache(cache_dir: Path) -> Path:
    """Keep compiled programs below `cache_dir`, in a folder for this kind of machine; return that folder.

    JAX's own key has the program, its options and jaxlib's version, but not the CPU's instruction set: a
    program compiled for another CPU may not run here if machines share a cache directory.
    """
    folder = Path(cache_dir) / "xla" / f"jax-{jax.__version__}-{jax.default_backend()}-{processor.kind()}"
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


OnCompilation = Callable[[str, float | None], None]
"""Called with a program's name when its compilation begins, and again, with its seconds, at the end."""
_listeners: list[OnCompilation] = []


def watch(listener: OnCompilation) -> None:
    """Call `listener` for every program of ours that is compiled from now on, until the process ends."""
    _listeners.append(listener)


@contextlib.contextmanager
def compiling(program: str) -> Iterator[None]:
    """Log a compilation in the block, and tell the listeners, at its beginning and its end."""
    log.info("compiling %s", program)
    for each in _listeners:
        each(program, None)
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - began
        log.info("compiled %s in %.2f s", program, seconds)
        for each in _listeners:
            each(program, seconds)


def log_all_compilations(compiled: Callable[[bool, float], None]) -> None:
    """Call `compiled(from_cache, seconds)` for every program that JAX compiles or finds in the cache, and log
    it.

    The debug log has all of them, the ordinary log those that take seconds. JAX's listeners last as long as
    the process: call this once.
    """
    current = threading.local()

    def on_event(event: str, **_) -> None:
        if event == _CACHE_HIT:
            current.from_cache = True

    def on_duration(event: str, duration_secs: float, **details) -> None:
        if event == _COMPILED:
            from_cache, current.from_cache = getattr(current, "from_cache", False), False
            level = logging.INFO if duration_secs >= _WORTH_A_LINE_SECONDS else logging.DEBUG
            how = "read from the cache" if from_cache else "compiled by XLA"
            compiled(from_cache, duration_secs)
            log.log(level, "%s: %s in %.2f s", details.get("fun_name", "a program"), how, duration_secs)

    monitoring.register_event_listener(on_event)
    monitoring.register_event_duration_secs_listener(on_duration)
