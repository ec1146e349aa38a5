"""Sums of gradients from one optimizer step to the next, and the zero trees that they begin with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ...model import sharding
from ..budget import Budget
from ..programs import Programs
from . import train_step
from .recycled import RecycledTrees
from .training_state import TrainingState
from .training_structure import describe, structure


class GradientAccumulation:
    """Adds gradients to those of a model's `TrainingState`, for any number of models over one base."""

    def __init__(self, programs: Programs, replicated: jax.sharding.Sharding, budget: Budget):
        """Gradients are sharded like the weights of their model; scalars are `replicated`."""
        self._programs = programs
        self._replicated = replicated
        self._zeros = RecycledTrees(budget)

    def zeros(self, state: TrainingState) -> Any:
        """Return a zero tree like the state's gradients, for the caller to keep or to `recycle`."""
        zeros = self._zeros.take(structure(state.lora))
        return zeros_like(state.weights) if zeros is None else zeros

    def recycle(self, state: TrainingState, zeros: Any) -> None:
        """Keep a tree of zeros for a later batch. Full weights are too large to keep idle."""
        if state.lora is not None:
            self._zeros.put(structure(state.lora), zeros)

    def forget_zeros(self) -> None:
        """Free the recycled trees."""
        self._zeros.clear()

    def add(self, state: TrainingState, gradients: Any) -> bool:
        """Add a batch's gradients (donated) to the state's.

        Returns False, and adds nothing, if the sum would not be finite. If this raises, the old sum stays
        unchanged.
        """
        total = self.zeros(state) if state.gradients is None else state.gradients
        key, pin = structure(state.lora), sharding.shardings_of(state.weights)
        program = self._programs.get(
            ("accumulate", key),
            f"accumulate {describe(key)}",
            train_step.accumulate,
            (total, gradients),
            donate=(1,),
            out_shardings=(pin, self._replicated),
        )
        summed, finite = program(total, gradients)
        finite = bool(finite)  # waits for the device, which may fail only now
        if state.gradients is None:
            self.recycle(state, total)
        if finite:
            state.gradients = summed
        return finite


def zeros_like(tree: Any) -> Any:
    """Return float32 zeros with the shapes and shardings of the tree's arrays."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32, device=x.sharding), tree)
