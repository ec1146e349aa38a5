"""Sleep: everything on the device goes to the host's memory, and comes back bit for bit.

Requests before a Sleep are finished first; later ones wake the engine and then run as if it had not slept. A
process that dies asleep has lost nothing that it would not have lost awake.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable

import jax

from . import messages
from .base_models import BaseModel
from .errors import UserError
from .models import Models
from .parking import Parked
from .training.training_state import TrainingState

log = logging.getLogger(__name__)


class Sleep:
    """Handles requests about sleep, and requests that have to wait for it."""

    def __init__(
        self,
        bases: list[BaseModel],
        models: Models,
        accept: Callable[[messages.ToEngine], None],
        answer: Callable[[messages.ToEngine, messages.Output | BaseException], None],
    ):
        self._bases, self._models = bases, models
        self._accept, self._answer = accept, answer
        self._wanted: list[messages.Sleep] = []
        self._held: deque[messages.ToEngine] = deque()  # what came after them
        self._weights: list[tuple[BaseModel, Parked]] = []
        self._states: list[tuple[TrainingState, Parked]] = []
        self.asleep = False

    @property
    def under_way(self) -> bool:
        """True if the engine falls asleep as soon as nothing is running or queued."""
        return bool(self._wanted)

    @property
    def bytes_waiting(self) -> int:
        """The bytes of models in training that are in the host's memory while the engine sleeps."""
        return sum(parked.bytes for _, parked in self._states)

    def takes(self, request: messages.ToEngine) -> bool:
        """Return whether the request is handled here. One that needs the device wakes it first."""
        match request:
            case messages.Sleep():
                self._wanted.append(request)
                return True
            case messages.Cancel():
                for waiting in [each for each in self._held if each.request_id == request.target]:
                    self._held.remove(waiting)
                    self._answer(waiting, UserError("cancelled"))
                return False
            case messages.ReleaseSampler() | messages.Stop():
                return False
        if self.under_way:
            self._held.append(request)
            return True
        outcome: messages.Output | Exception = messages.Slept(0, 0.0)
        try:
            if self.asleep:
                outcome = self._wake_up()
        except Exception as error:
            outcome = error
        if isinstance(request, messages.WakeUp) or isinstance(outcome, Exception):
            self._answer(request, outcome)
            return True
        return False

    def fall_asleep(self) -> None:
        """Fall asleep, as nothing is running or queued; answer the Sleeps, and accept later requests."""
        outcome: messages.Output | Exception = messages.Slept(0, 0.0)
        try:
            if not self.asleep:
                outcome = self._park()
        except Exception as error:
            outcome = error
        wanted, held = list(self._wanted), list(self._held)
        self._wanted.clear()
        self._held.clear()
        for sleep in wanted:
            self._answer(sleep, outcome)
        for waiting in held:
            self._accept(waiting)

    def _park(self) -> messages.Slept:
        """Move the state to the host. If the host has no room, the error changes nothing."""
        began = time.perf_counter()
        self._models.finish_exports()
        weights = [(base, Parked(base.trainer.base)) for base in self._bases]
        states = [
            (state, Parked((state.weights, state.optimizer, state.gradients)))
            for state in self._models.states_on_device()
        ]
        for base in self._bases:
            base.samplers.park()
            base.trainer.forget_zeros()
        parked = [parked for _, parked in (*weights, *states)]
        for each in parked:
            each.free()
        gc.collect()  # what the samplers had besides weights
        self._weights, self._states, self.asleep = weights, states, True
        return _slept("asleep", parked, began)

    def _wake_up(self) -> messages.Slept:
        """Move the state back. If the device has no room, the engine stays asleep."""
        began = time.perf_counter()
        weights = [(base, parked.on_device()) for base, parked in self._weights]
        states = [(state, parked.on_device()) for state, parked in self._states]
        for base, placed in weights:
            base.trainer.base = placed
        for state, placed in states:
            state.weights, state.optimizer, state.gradients = placed
        for base in self._bases:
            base.samplers.unpark()
        parked = [parked for _, parked in (*self._weights, *self._states)]
        self._weights, self._states, self.asleep = [], [], False
        return _slept("awake", parked, began)


def _slept(how: str, parked: list[Parked], began: float) -> messages.Slept:
    size, seconds = sum(each.bytes for each in parked), time.perf_counter() - began
    log.info("%s: %.1f MB moved in %.2f s", how, size / 1e6, seconds)
    return messages.Slept(size, seconds, sum(array.nbytes for array in jax.live_arrays()))
