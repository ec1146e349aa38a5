"""Programs that run a micro-batch, forward alone or with gradients, and checks that they fit the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ...model import sharding
from ...model.config import ModelConfig
from ...model.counts import counts
from ...model.cpu.weights import stored_layers
from .. import memory
from ..budget import Budget
from ..device_memory import free_bytes
from ..errors import UserError
from ..messages import LoraSpec
from ..programs import Programs
from . import train_step
from .train_step import Batch, Outputs, Static
from .training_state import TrainingState
from .training_structure import abstract_batch, describe, structure


class DoesNotFitError(UserError):
    """The program of a micro-batch needs more memory than the device has; it did not run."""


class GradientPrograms:
    """Micro-batches over one frozen base, of one or several models at once."""

    def __init__(
        self,
        programs: Programs,
        mesh: Mesh,
        config: ModelConfig,
        base: Any,
        static: Static,
        remat: str | None,
        budget: Budget,
        kept_bytes: int,
    ):
        """`static.remat` is replaced by `remat`, by default the fastest that keeps at most `kept_bytes` of a
        micro-batch.

        Items of the `budget` make room for a program that needs more than is free.
        """
        self._programs = programs
        self._mesh = mesh
        self.base = base
        self._replicated = sharding.replicated(mesh)
        self._static = static
        self._remat = remat
        self._row_devices = sharding.row_devices(mesh)
        self._counts = counts(config)
        self._budget, self._kept_bytes = budget, kept_bytes

    def put(self, batch: Batch) -> Batch:
        """Put a micro-batch of NumPy arrays onto the mesh."""
        return jax.device_put(
            batch, jax.tree.map(lambda x: sharding.rows_sharding(self._mesh, x.shape), batch)
        )

    def run_gradients(
        self, states: Sequence[TrainingState], gradients: tuple, batch: Batch, sequence_level: bool
    ) -> tuple[tuple, Outputs]:
        """Return each state's `gradients` (donated) plus those of the micro-batch, and its outputs.

        Raises DoesNotFitError, and the device's error when it is out of memory.
        """
        weights = tuple(state.weights for state in states)
        key = structure(states[0].lora)
        program = self._gradient_program(key, weights, gradients, batch, sequence_level)
        self._check_fits(program, batch)
        if key is None:
            total, outputs = program(weights[0], gradients[0], batch)
            return (total,), outputs
        return program(stored_layers(self.base), weights, self._scales(states), gradients, batch)

    def run_forward(self, states: Sequence[TrainingState], batch: Batch, sequence_level: bool) -> Outputs:
        """Return the outputs alone. Raises as `run_gradients`."""
        weights = tuple(state.weights for state in states)
        key = structure(states[0].lora)
        static = self._static._replace(sequence_level=sequence_level)
        function: Callable[..., Any]
        arguments: tuple[Any, ...]
        if key is None:
            function, arguments = train_step.forward_weights, (weights[0], batch)
        else:
            function = train_step.forward_adapters
            arguments = (stored_layers(self.base), weights, self._scales(states), batch)
        name = f"forward {describe(key, batch, len(states), sequence_level)}"
        program = self._programs.get(
            name, name, partial(function, static), arguments, out_shardings=self._replicated
        )
        self._check_fits(program, batch)
        return program(*arguments)

    def warm_up(
        self, lora: LoraSpec | None, weights: Any, shapes: Sequence[tuple[int, int]]
    ) -> list[jax.stages.Compiled]:
        """Compile the gradients of one model with such (abstract) weights, for micro-batches (T, B)."""
        batches = [abstract_batch(self._mesh, rows, length) for length, rows in shapes]
        return [
            self._gradient_program(structure(lora), (weights,), (weights,), batch, False) for batch in batches
        ]

    def _gradient_program(self, key, weights: tuple, gradients: tuple, batch: Batch, sequence_level: bool):
        static = self._static._replace(
            sequence_level=sequence_level, remat=self._remat or self._remat_of(batch)
        )
        name = f"forward_backward {describe(key, batch, len(weights), sequence_level)}"
        function: Callable[..., Any]
        arguments: tuple[Any, ...]
        if key is None:
            function = train_step.forward_backward_weights
            arguments = (weights[0], gradients[0], batch)
            donate, pin = (1,), sharding.shardings_of(gradients[0])
        else:
            function = train_step.forward_backward_adapters
            scales = jax.ShapeDtypeStruct((len(weights),), jnp.float32, sharding=self._replicated)
            arguments = (stored_layers(self.base), weights, scales, gradients, batch)
            donate, pin = (3,), sharding.shardings_of(gradients)
        return self._programs.get(
            name,
            name,
            partial(function, static),
            arguments,
            donate=donate,
            out_shardings=(pin, self._replicated),
        )

    def make_way(self) -> None:
        """After the device ran out of memory, let half of what may leave it leave."""
        self._budget.give_up(self._budget.bytes // 2)

    def _check_fits(self, program: jax.stages.Compiled, batch: Batch) -> None:
        """Compare the program's memory beside its arguments, as compiled, with what is free.

        A CPU has no such limit.
        """
        free = free_bytes(self._mesh.local_devices[0])
        if free is None or (analysis := program.memory_analysis()) is None:
            return
        needed = analysis.output_size_in_bytes - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes
        if needed > free:
            self._budget.give_up(needed - free)
            free = free_bytes(self._mesh.local_devices[0]) or 0
        if needed > free:
            rows, length = batch.tokens.shape
            raise DoesNotFitError(
                f"a micro-batch of {rows} x {length} tokens takes {needed / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} GiB of the device are free; send shorter datums or fewer targets per "
                "token"
            )

    def _remat_of(self, batch: Batch) -> str:
        """Return the remat for what one device computes of the micro-batch."""
        tokens = batch.tokens.shape[0] * batch.tokens.shape[1] // self._row_devices
        itemsize, tensor = self._static.dtype.itemsize, self._mesh.shape["tensor"]
        return memory.choose_remat(self._counts, tokens, itemsize, self._kept_bytes, tensor)

    def _scales(self, states: Sequence[TrainingState]) -> jax.Array:
        return jax.device_put(np.array([s.scale for s in states], np.float32), self._replicated)
