"""Models in training, with their states on the device or in the host's memory until their next turn."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from .base_models import BaseModel
from .budget import Budget
from .parking import Parked
from .training.training_state import TrainingState

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Model:
    """A model in training on its base.

    While `parked`, its state has no arrays, and `needs` are the bytes that it will take on each device.
    `used`: when it was last used (`Budget.now`).
    """

    base: BaseModel
    state: TrainingState
    parked: Parked | None = None
    needs: int = 0
    used: int = 0
    _sizes: tuple[int, int] | None = None  # of the weights, and of the optimizer's state

    @property
    def bytes(self) -> int:
        """The bytes that its state takes on each device."""
        if self.parked is not None:
            return 0
        if self._sizes is None:  # they stay the same
            self._sizes = _bytes(self.state.weights), _bytes(self.state.optimizer)
        weights, optimizer = self._sizes
        return weights + optimizer + (0 if self.state.gradients is None else weights)


class Tenants:
    """Models by id. Within the budget, the states of those used last are on the device.

    A state leaves for the host's memory when something else needs its room, and comes back bit for bit when
    it is used. While a model has a turn (`is_running`) its state stays. On a CPU, whose memory is the host's,
    no state leaves (`may_leave`).
    """

    kind = "tenants"

    def __init__(self, budget: Budget, is_running: Callable[[str], bool], may_leave: bool):
        self._budget, self._is_running, self.may_leave = budget, is_running, may_leave
        self._models: dict[str, Model] = {}
        budget.add(self)

    def __contains__(self, model_id: str) -> bool:
        return model_id in self._models

    def peek(self, model_id: str) -> Model | None:
        """Return a model without its arrays: they may not be on the device."""
        return self._models.get(model_id)

    def use(self, model_id: str) -> Model:
        """Return a model whose state is on the device. Raises KeyError."""
        model = self._models[model_id]
        self._budget.make_room(model.needs if model.parked else 0)
        if model.parked is not None:
            state = model.state
            state.weights, state.optimizer, state.gradients = model.parked.on_device()
            model.parked = None
            log.debug("the state of model %s is back on the device", model_id)
        model.used = self._budget.now()
        return model

    def add(self, model_id: str, base: BaseModel, state: TrainingState) -> None:
        self._models[model_id] = Model(base, state, used=self._budget.now())
        self._budget.make_room(0)

    def remove(self, model_id: str) -> None:
        del self._models[model_id]

    def states_on_device(self) -> list[TrainingState]:
        return [model.state for model in self._models.values() if model.parked is None]

    @property
    def bytes(self) -> int:
        return sum(model.bytes for model in self._models.values())

    @property
    def bytes_waiting(self) -> int:
        """The bytes of states in the host's memory."""
        return sum(model.parked.bytes for model in self._models.values() if model.parked)

    @property
    def oldest(self) -> int | None:
        return min((model.used for _, model in self._leavers()), default=None)

    def drop_oldest(self) -> None:
        model_id, model = min(self._leavers(), key=lambda each: each[1].used)
        state, model.needs = model.state, model.bytes
        model.parked = Parked((state.weights, state.optimizer, state.gradients))
        model.parked.free()
        state.weights = state.optimizer = state.gradients = None
        log.debug("the state of model %s waits in the host's memory", model_id)

    def _leavers(self) -> list[tuple[str, Model]]:
        if not self.may_leave:
            return []
        return [
            (model_id, model)
            for model_id, model in self._models.items()
            if model.parked is None and not self._is_running(model_id)
        ]


def _bytes(tree: Any) -> int:
    """Return the bytes that a tree takes on each device."""
    return sum(_on_one_device(leaf) for leaf in jax.tree.leaves(tree))


def _on_one_device(leaf: jax.Array) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape)
    size = leaf.dtype.itemsize
    for length in shape:
        size *= length
    return size
