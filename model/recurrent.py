"""The mixers that keep a state of every sequence (`config.Recurrent`), by their descriptions.

Each takes tokens, whose type is its own, and the weights of its convolution.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from jaxtyping import Array, Bool, Float, Int

from . import delta_net, mamba2
from .config import DeltaNet, Mamba2, Recurrent
from .states import State

_RULES: dict[type, ModuleType] = {DeltaNet: delta_net, Mamba2: mamba2}


def mix_rows(
    mixer: Recurrent, tokens: Any, weights: Any, start_BT: Int[Array, "B T"]
) -> Float[Array, "B T *heads"]:
    """Mix the tokens of each segment of packed rows; `start_BT` is the first token of each one's segment."""
    return _RULES[type(mixer)].mix_rows(mixer, tokens, weights, start_BT)


def mix_on(
    mixer: Recurrent, tokens: Any, weights: Any, state: State, real_BT: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T *heads"], State]:
    """Mix rows that go on from `state`. Returns the state after the `real` tokens, which come first."""
    return _RULES[type(mixer)].mix_on(mixer, tokens, weights, state, real_BT)


def mix_one(
    mixer: Recurrent, tokens: Any, weights: Any, state: State
) -> tuple[Float[Array, "B 1 *heads"], State]:
    """Mix one token of each row with what came before it."""
    return _RULES[type(mixer)].mix_one(mixer, tokens, weights, state)
