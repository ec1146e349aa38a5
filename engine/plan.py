"""`python -m tinsmith.engine.plan`: compile a training step for devices that are not here.

Reads a `StepToCompile` as JSON on standard input; prints a `CompiledStep`. It runs in a process of its own,
for the server's process has no JAX. Exits with 1, and the reason as the last line on standard error, if the
step cannot be compiled.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

import msgspec

from . import compile_only
from .device_catalogue import find
from .memory import CompiledStep, StepToCompile


def main() -> int:
    step = msgspec.json.decode(sys.stdin.buffer.read(), type=StepToCompile)
    os.environ.update(compile_only.ENVIRONMENT)
    try:
        compiled = compile_step(step)
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", file=sys.stderr)
        return 1
    print(msgspec.json.encode(compiled).decode())
    return 0


def compile_step(step: StepToCompile) -> CompiledStep:
    """Compile forward and backward over one micro-batch, as the trainer does, from shapes alone."""
    import jax
    from jax.sharding import AxisType, Mesh

    from ..model import decoder, sharding
    from ..model.folder import stated_config
    from .messages import LoraSpec
    from .precision import set_precision
    from .training.trainer import Trainer

    began = time.perf_counter()
    work, sizes = step.work, step.mesh
    config = dataclasses.replace(stated_config(Path(step.folder)), max_sequence_length=work.sequence)
    axes = sharding.MESH_AXES
    on = compile_only.devices(find(step.device)).reshape([getattr(sizes, axis) for axis in axes])
    mesh = Mesh(on, axes, axis_types=(AxisType.Auto,) * len(axes))
    dtype = "bfloat16" if work.itemsize == 2 else "float32"
    set_precision(dtype, find(step.device).platform)
    graph, abstract = decoder.build(config, dtype)
    shardings = sharding.shardings_for(abstract, decoder.logical_axes(config), mesh)
    base = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    trainer = Trainer(graph, base, config, mesh, chunk_tokens=work.chunk, remat=step.remat)
    lora = None if work.full_weight else LoraSpec(work.rank, float(work.rank), 0)
    shape = work.sequence, step.rows * sizes.row_devices
    (program,) = trainer.warm_up(lora, [shape])
    analysis = program.memory_analysis()
    return CompiledStep(
        analysis.argument_size_in_bytes, analysis.temp_size_in_bytes, time.perf_counter() - began
    )


if __name__ == "__main__":
    sys.exit(main())
