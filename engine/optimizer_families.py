"""The optimizers that a model can be created with, by the name that clients use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import dimuon, optimizer
from .errors import UserError
from .messages import AdamParams, DimuonParams

Params = AdamParams | DimuonParams


@dataclass(frozen=True)
class Family:
    """`new_state(count, new)`: a state whose trees like the weights are what `new()` gives.
    `hyperparameters(params, grad_scale, rank)`: float32 scalars for `step`."""

    params: type[Params]
    state: type[Any]
    new_state: Callable[[Any, Callable[[], Any]], Any]
    hyperparameters: Callable[[Any, float, int], Any]
    step: Callable[..., Any]


def _adam_state(count: Any, new: Callable[[], Any]) -> optimizer.AdamState:
    return optimizer.AdamState(count, new(), new())


def _scalars(params: Params) -> dict[str, Any]:
    return {name: np.float32(getattr(params, name)) for name in params.__struct_fields__}


def _adam(params: AdamParams, grad_scale: float, rank: int) -> optimizer.AdamHyperparameters:
    return optimizer.AdamHyperparameters(**_scalars(params), grad_scale=np.float32(grad_scale))


def _dimuon(params: DimuonParams, grad_scale: float, rank: int) -> dimuon.DimuonHyperparameters:
    return dimuon.DimuonHyperparameters(
        **_scalars(params), grad_scale=np.float32(grad_scale), rank=np.float32(rank)
    )


FAMILIES = {
    "adamw": Family(AdamParams, optimizer.AdamState, _adam_state, _adam, optimizer.step),
    "dimuon": Family(DimuonParams, dimuon.DimuonState, dimuon.new_state, _dimuon, dimuon.step),
}


def family(name: str) -> Family:
    """Raises UserError naming those there are."""
    if name not in FAMILIES:
        raise UserError(f"unknown optimizer {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]
