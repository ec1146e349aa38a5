"""The optimizers that a model can be created with, by the name that clients use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import UserError
from ..messages import AdamParams, DimuonParams, LossValue
from . import dimuon, muon, optimizer, sgd

Params = AdamParams | DimuonParams
Options = Mapping[str, LossValue]


@dataclass(frozen=True)
class Family:
    """One optimizer: its parameters, its state and its step.

    - `new_state(count, new)` returns a state; `new()` makes each of its trees like the weights.
    - `hyperparameters(params, options, grad_scale, rank)` returns the float32 scalars that `step` takes.
    - `options` holds a model's options, which are the same for all its steps, with their defaults.
    - `choices` lists the words that an option may be, `below` the bound that a number stays under.
    """

    params: type[Params]
    state: type[Any]
    new_state: Callable[[Any, Callable[[], Any]], Any]
    hyperparameters: Callable[[Any, Options, float, int], Any]
    step: Callable[..., Any]
    options: Options = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    below: Mapping[str, float] = field(default_factory=dict)  # and every number is at least 0


def _adam_state(count: Any, new: Callable[[], Any]) -> optimizer.AdamState:
    return optimizer.AdamState(count, new(), new())


def _scalars(**values: float) -> dict[str, np.float32]:
    """Round to the nearest finite float32.

    A positive number stays positive: it is raised to the smallest normal number, because devices treat
    anything below that as 0.
    """
    smallest, largest = (float(bound) for bound in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
    return {
        name: np.float32(min(max(value, smallest), largest) if value > 0 else value)
        for name, value in values.items()
    }


def _all(params: Params) -> dict[str, float]:
    return {name: getattr(params, name) for name in params.__struct_fields__}


def _adam(params: AdamParams, options: Options, grad_scale: float, rank: int) -> Any:
    return optimizer.AdamHyperparameters(**_scalars(**_all(params), grad_scale=grad_scale))


def _dimuon(params: DimuonParams, options: Options, grad_scale: float, rank: int) -> Any:
    return dimuon.DimuonHyperparameters(**_scalars(**_all(params), grad_scale=grad_scale, rank=rank))


def _sgd(params: AdamParams, options: Options, grad_scale: float, rank: int) -> Any:
    return sgd.SgdHyperparameters(
        **_scalars(
            learning_rate=params.learning_rate,
            weight_decay=params.weight_decay,
            grad_clip_norm=params.grad_clip_norm,
            grad_scale=grad_scale,
            momentum=float(options.get("momentum", 0.0)),
            nesterov=float(options.get("nesterov", False)),
        )
    )


def _muon(params: AdamParams, options: Options, grad_scale: float, rank: int) -> Any:
    return muon.MuonHyperparameters(
        **_scalars(
            **_all(params),
            grad_scale=grad_scale,
            rank=rank,
            matrix_learning_rate=params.learning_rate * float(options["muon_lr_factor"]),
            momentum=float(options["muon_momentum"]),
            nesterov=float(options["muon_nesterov"]),
            match_rms=float(options["muon_adjust_lr_fn"] == "match_rms_adamw"),
        )
    )


FAMILIES = {
    "adamw": Family(AdamParams, optimizer.AdamState, _adam_state, _adam, optimizer.step),
    "dimuon": Family(DimuonParams, dimuon.DimuonState, dimuon.new_state, _dimuon, dimuon.step),
    "sgd": Family(
        AdamParams,
        sgd.SgdState,
        sgd.new_state,
        _sgd,
        sgd.step,
        options={"momentum": 0.0, "nesterov": False},
        below={"momentum": 1.0},
    ),
    "signsgd": Family(AdamParams, sgd.SignState, sgd.new_sign_state, _sgd, sgd.sign_step),
    "muon": Family(
        AdamParams,
        muon.MuonState,
        muon.new_state,
        _muon,
        muon.step,
        # `muon_lr_factor`: Muon's learning rate divided by AdamW's.
        options={
            "muon_momentum": 0.95,
            "muon_nesterov": True,
            "muon_ns_steps": float(muon.ITERATIONS),
            "muon_adjust_lr_fn": "original",
            "muon_lr_factor": 1.0,
        },
        choices={"muon_adjust_lr_fn": ("original", "match_rms_adamw")},
        below={"muon_momentum": 1.0, "muon_lr_factor": math.inf},
    ),
}


def family(name: str) -> Family:
    """Return the optimizer of that name. Raises UserError naming the known ones."""
    if name not in FAMILIES:
        raise UserError(f"unknown optimizer {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def filled(name: str, options: Options) -> dict[str, LossValue]:
    """Return an optimizer's options with defaults filled in.

    Raises UserError for an option that it does not have, or a value out of range.
    """
    chosen = family(name)
    for key, value in options.items():
        where = f"optimizer option {key!r} is {value!r}; it must be"
        if key not in chosen.options:
            known = ", ".join(chosen.options) or "none"
            raise UserError(f"optimizer {name!r} has no option {key!r}; it takes: {known}")
        if key in chosen.choices:
            if value not in chosen.choices[key]:
                raise UserError(f"{where} one of: {', '.join(chosen.choices[key])}")
        elif isinstance(chosen.options[key], bool):
            if not isinstance(value, bool):
                raise UserError(f"{where} true or false")
        elif isinstance(value, (bool, str)) or not math.isfinite(value):
            raise UserError(f"{where} a finite number")
        elif key not in chosen.below:
            if value != chosen.options[key]:
                raise UserError(f"{where} {chosen.options[key]:g}, the only possible value")
        elif not (value >= 0 and np.float32(value) < np.float32(chosen.below[key])):
            raise UserError(
                f"{where} at least 0 and below {chosen.below[key]:g}, also when rounded to float32"
            )
    whole = {**chosen.options, **options}
    if whole.get("nesterov") and not whole["momentum"]:
        raise UserError("optimizer option 'nesterov' needs a momentum over 0")
    return whole
