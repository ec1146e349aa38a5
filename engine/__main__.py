"""`python -m tinsmith.engine`: the process that owns the accelerator.

It reads an EngineConfig as JSON on standard input, connects to the server's socket, loads the base models,
and runs operations until the server stops it (queued operations are finished first) or has ended.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import msgspec

from ..ckpt.tokenizer_files import without_torch
from ..model.load import find_model
from ..model.sharding import make_mesh
from . import base_models, compilation, logs, messages, precision
from .loop import Engine
from .measurements import Measurements
from .socket import Socket
from .training.custom_loss_processes import CustomLossProcesses

log = logging.getLogger("tinsmith.engine")


def main() -> int:
    without_torch()
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=messages.EngineConfig)
    # absl, which Orbax imports, has installed a handler of its own: it goes.
    logs.configure(config.log_level, config.log_format, Path(config.data_dir) / logs.FOLDER / "engine.log")
    socket = Socket(config.address, config.beat_seconds)
    # Ctrl-C, and the SIGTERM of many service managers, reach all processes at once: the server then stops the
    # engine, after it has saved the models.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        try:
            engine = load(config, socket)
        except (OSError, ValueError) as error:  # an unusable folder, model or mesh
            log.error("cannot start: %s", error)
            return 1
        engine.run()
    finally:
        socket.close()
    log.info("stopped")
    return 0


def load(config: messages.EngineConfig, socket: Socket) -> Engine:
    """Load the base models onto the devices, reporting progress to the server; return the engine."""

    phase: Literal["loading", "ready"] = "loading"

    def tell(text: str) -> None:
        log.info("%s", text)
        socket.send(messages.Status(phase, text))

    def compiles(program: str, seconds: float | None) -> None:
        if seconds is None:
            socket.send(messages.Status("compiling", f"compiling {program}"))
        else:
            socket.send(messages.Status(phase, f"compiled {program} in {seconds:.1f} s"))

    began = time.perf_counter()
    tell("starting JAX")
    measurements = Measurements(socket.send)
    compilation.log_all_compilations(measurements.compiled)
    compilation.watch(compiles)
    cache = compilation.use_cache(Path(config.cache_dir))
    mesh = make_mesh(config.mesh or None)
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    log.info("JAX %s on %s; compiled programs are kept in %s", jax.__version__, devices, cache)
    platform = mesh.devices.flat[0].platform
    precision.set_precision(base_models.compute_dtype(config.dtype), platform)
    log.info("on this backend %s", precision.promise(platform))
    memory = base_models.EngineMemory.of(config, mesh)
    log.info("memory planned, in %s", memory.plan)
    bases: dict[str, base_models.BaseModel] = {}
    losses = CustomLossProcesses()
    for number, declared in enumerate(config.base_models, start=1):
        loading = f"loading {declared.name} ({number} of {len(config.base_models)}) onto {devices}"
        tell(loading)

        def loaded(so_far: int, total: int, loading: str = loading) -> None:
            size = f"{so_far / 1e6:.1f} of {total / 1e6:.1f} MB"
            socket.send(messages.Status(phase, f"{loading}: {size}"))
            log.debug("%s: %s", loading, size)

        same = (base for base in bases.values() if base.folder == find_model(declared.path))
        shared = next(same, None) or base_models.load(declared, config, mesh, memory, losses, loaded)
        bases[declared.name] = dataclasses.replace(shared, name=declared.name)
    engine = Engine(config, bases, socket, measurements)
    phase = "ready"
    tell(f"ready after {time.perf_counter() - began:.1f} s with {', '.join(bases)} on {devices}")
    return engine


if __name__ == "__main__":
    sys.exit(main())
