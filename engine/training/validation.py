"""Checks of training operations against the model, once, before anything runs.

Every message names the datum by its index and the field, and says what would be right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...losses import REGISTRY, Loss
from ..errors import UserError
from ..messages import AdamParams, Datum, DimuonParams, LossValue, Tensor

CONFIG_INPUTS = frozenset(key for loss in REGISTRY.values() for key in loss.config)
EXPERTS = "routed_experts"
"""The input that names the experts of each token: integers [N, M k] with the k experts of the first of M
layers with experts, then those of the next. All -1 in a layer leaves the choice to its router."""
MAX_TARGETS = 1024  # per position
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class TrainingDatum:
    """A checked datum: `tokens` int32[N], `targets` int32[N, K], the loss's other inputs float32[N, K].

    `shape` is that of the client's `target_tokens`, (N,) or (N, K); log-probs go back in it.
    """

    tokens: np.ndarray
    targets: np.ndarray
    inputs: dict[str, np.ndarray]
    shape: tuple[int, ...]
    experts: np.ndarray | None = None  # int16[N, M, k], see `EXPERTS`; -1 leaves the choice to the router


@dataclass(frozen=True)
class ChosenLoss:
    """A loss with its config values, in the loss's order, and the requested metrics."""

    loss: Loss
    config: tuple[float, ...]
    reports: frozenset[str] = frozenset()

    @property
    def values(self) -> dict[str, float]:
        return dict(zip(self.loss.config, self.config, strict=True))


def check_loss(name: str, config: Mapping[str, LossValue]) -> ChosenLoss:
    """Return the loss and its config values, with defaults filled in."""
    if name not in REGISTRY:
        raise UserError(f"unknown loss_fn {name!r}; known: {', '.join(REGISTRY)}")
    loss = REGISTRY[name]
    for key in config:
        if key not in loss.keys:
            known = ", ".join(loss.keys) or "none"
            raise UserError(f"loss_fn_config has an unknown key {key!r} for loss {name!r}; it takes: {known}")
    reports = frozenset(key for key in loss.reports if _number(key, config.get(key, False), loss))
    for key, variants in loss.variants.items():
        word = config.get(key, next(iter(variants)))
        if word not in variants:
            raise UserError(f"loss_fn_config[{key!r}] is {word!r}; it must be one of: {', '.join(variants)}")
        loss = variants[str(word)]
    given = {key: _number(key, value, loss) for key, value in config.items() if key in loss.config}
    values = {**loss.config, **given}
    for kind in ("clip", "mask"):
        low, high = f"{kind}_low_threshold", f"{kind}_high_threshold"
        if low in values and values[low] > values[high]:
            raise UserError(
                f"loss_fn_config: {low} {values[low]} is above {high} {values[high]}; "
                "they bound the probability ratio from below and above"
            )
    if loss.check is not None and (wrong := loss.check(values)):
        raise UserError(f"loss_fn_config: {wrong}")
    return ChosenLoss(loss, tuple(float(values[key]) for key in loss.config), reports)


def _number(key: str, value: LossValue, loss: Loss) -> float:
    """Return a value as the compiled functions take it: words as their places, flags as 0 and 1."""
    where = f"loss_fn_config[{key!r}] is {value!r}; it must be"
    if key in loss.choices:
        if value not in loss.choices[key]:
            raise UserError(f"{where} one of: {', '.join(loss.choices[key])}")
        return float(loss.choices[key].index(str(value)))
    if key in loss.flags or key in loss.reports:
        if value not in (False, True):  # 0 and 1 too
            raise UserError(f"{where} true or false")
        return float(value)
    if isinstance(value, (bool, str)) or not math.isfinite(value):
        raise UserError(f"{where} a finite number")
    return min(max(float(value), -FLOAT32_MAX), FLOAT32_MAX)  # a threshold beyond bounds nothing


def check_data(
    data: Sequence[Datum],
    chosen: ChosenLoss,
    vocab_size: int,
    max_length: int,
    routing: tuple[int, int, int] | None = None,
) -> list[TrainingDatum]:
    """Decode and check every datum of one operation. `routing` is `ModelConfig.routing`."""
    if not data:
        raise UserError("data is empty; give at least one datum")
    return [
        _check_datum(index, datum, chosen, vocab_size, max_length, routing)
        for index, datum in enumerate(data)
    ]


def check_optimizer(params: AdamParams | DimuonParams) -> None:
    """Check that the parameters are within the ranges in which a step is defined."""
    where = "adam_params" if isinstance(params, AdamParams) else "optimizer_params"
    for field in params.__struct_fields__:
        value = getattr(params, field)
        signed = isinstance(params, DimuonParams) and field == "grad_clip_norm"  # below 0 is off
        if not math.isfinite(value) or (value < 0 and not signed):
            raise UserError(f"{where}.{field} is {value}; it must be a finite number, at least 0")
        if field in ("learning_rate", "weight_decay") and value > FLOAT32_MAX:
            raise UserError(
                f"{where}.{field} is {value}; it must be at most {FLOAT32_MAX:.3g}, as float32 is"
            )
        if field in ("beta1", "beta2") and np.float32(value) >= 1:
            raise UserError(f"{where}.{field} is {value}; it must be below 1, also when rounded to float32")


def _check_datum(
    index: int,
    datum: Datum,
    chosen: ChosenLoss,
    vocab_size: int,
    max_length: int,
    routing: tuple[int, int, int] | None,
) -> TrainingDatum:
    loss = chosen.loss
    if len(datum.tokens) % 4:
        raise UserError(f"datum {index}: model_input is {len(datum.tokens)} bytes; int32 tokens take 4 each")
    tokens = np.frombuffer(datum.tokens, "<i4")
    length = len(tokens)
    if length == 0:
        raise UserError(f"datum {index}: model_input is empty; give at least one token")
    if length > max_length:
        raise UserError(
            f"datum {index}: model_input has {length} tokens; this model takes at most {max_length}"
        )
    _check_tokens(f"datum {index}: model_input", tokens, vocab_size)
    for name in loss.required_inputs:
        if name not in datum.inputs:
            needed = ", ".join(loss.required_inputs)
            raise UserError(
                f"datum {index}: loss_fn_inputs has no {name!r}; loss {loss.name!r} needs {needed}"
            )
    for name in CONFIG_INPUTS & datum.inputs.keys():
        raise UserError(
            f"datum {index}: loss_fn_inputs[{name!r}] is not supported per token; put it into loss_fn_config"
        )
    targets, shape = _check_targets(index, datum.inputs["target_tokens"], length, loss, vocab_size)
    names = [name for name in (*loss.required_inputs[1:], *loss.defaults) if name in datum.inputs]
    # The loss's masks first: what they mask is a placeholder in the other inputs.
    masks = {loss.valid, loss.sequence_mask} if loss.sequence_level else {loss.valid}
    inputs = {}
    masked = np.ones(shape, bool)
    for name in sorted(names, key=lambda name: name not in masks):
        placeholder = None if name in masks else masked
        values = _check_input(index, name, datum.inputs[name], shape, placeholder)
        if name in masks:
            masked &= values == 0
        inputs[name] = values.reshape(targets.shape)
    for name, default in loss.defaults.items():
        inputs.setdefault(name, np.full(targets.shape, default, np.float32))
    if loss.sequence_level:
        inputs["sequence_ratio_mask"] = inputs[loss.sequence_mask]
    if loss.reference is not None and chosen.values[loss.reference.when]:
        name = loss.reference.name
        if name not in datum.inputs:
            raise UserError(
                f"datum {index}: loss_fn_inputs has no {name!r}; loss {loss.name!r} needs it where "
                f"{loss.reference.when} is not 0"
            )
        values = _check_input(index, name, datum.inputs[name], shape, masked)
        inputs["reference_logprobs"] = values.reshape(targets.shape)
    experts = None
    if EXPERTS in datum.inputs:
        experts = _check_experts(index, datum.inputs[EXPERTS], length, routing)
    return TrainingDatum(tokens, targets, inputs, shape, experts)


def _check_experts(
    index: int, tensor: Tensor, length: int, routing: tuple[int, int, int] | None
) -> np.ndarray:
    where = f"datum {index}: loss_fn_inputs[{EXPERTS!r}]"
    if routing is None:
        raise UserError(f"{where}: this model has no experts; leave it out")
    layers, chosen, count = routing
    if tensor.dtype not in ("int64", "int32"):
        raise UserError(f"{where} has dtype {tensor.dtype}; it must be int64")
    if tuple(tensor.shape) != (length, layers * chosen):
        raise UserError(
            f"{where} has shape {list(tensor.shape)}; it must be [{length}, {layers * chosen}]: for each "
            f"token {chosen} experts in each of {layers} layers"
        )
    experts = decode(where, tensor).reshape(length, layers, chosen)
    wrong = (experts < -1) | (experts >= count) | ((experts < 0) != (experts[..., :1] < 0))
    ordered = np.sort(experts, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    wrong |= twice.any(-1, keepdims=True)
    if wrong.any():
        token, layer, _ = np.argwhere(wrong)[0].tolist()
        raise UserError(
            f"{where} has {experts[token, layer].tolist()} for token {token} in layer {layer} of those "
            f"with experts; it must be {chosen} different experts from 0 to {count - 1}, or all -1"
        )
    return experts.astype(np.int16)


def _check_targets(
    index: int, tensor: Tensor, length: int, loss: Loss, vocab_size: int
) -> tuple[np.ndarray, tuple[int, ...]]:
    where = f"datum {index}: loss_fn_inputs['target_tokens']"
    shape = tuple(tensor.shape)
    if tensor.dtype not in ("int64", "int32"):
        raise UserError(f"{where} has dtype {tensor.dtype}; it must be int64")
    if len(shape) not in (1, 2) or shape[0] != length:
        raise UserError(
            f"{where} has shape {list(shape)}; model_input has {length} tokens, "
            f"so it must be [{length}]{f' or [{length}, K]' if loss.multi_target else ''}"
        )
    if len(shape) == 2 and not loss.multi_target:
        raise UserError(f"{where} has shape {list(shape)}; loss {loss.name!r} takes one target per token")
    if len(shape) == 2 and not 1 <= shape[1] <= MAX_TARGETS:
        raise UserError(f"{where} has {shape[1]} targets per token; it must have 1 to {MAX_TARGETS}")
    targets = decode(where, tensor)
    _check_tokens(where, targets, vocab_size)
    return targets.astype(np.int32).reshape(length, -1), shape


def _check_input(
    index: int, name: str, tensor: Tensor, shape: tuple[int, ...], masked: np.ndarray | None = None
) -> np.ndarray:
    """Return the input's values. Where `masked` is True they may be anything, and are returned as 0."""
    where = f"datum {index}: loss_fn_inputs[{name!r}]"
    if tensor.dtype != "float32":
        raise UserError(f"{where} has dtype {tensor.dtype}; it must be float32")
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{where} has shape {list(tensor.shape)}; it must be {list(shape)}, that of target_tokens"
        )
    values = decode(where, tensor)
    if masked is not None:
        values = np.where(masked, np.float32(0), values)
    if not np.isfinite(values).all():
        at = np.argwhere(~np.isfinite(values))[0].tolist()
        raise UserError(f"{where} is {values[tuple(at)]} at position {at}; every value must be finite")
    return values


def _check_tokens(where: str, tokens: np.ndarray, vocab_size: int) -> None:
    wrong = (tokens < 0) | (tokens >= vocab_size)
    if wrong.any():
        at = np.argwhere(wrong)[0]
        raise UserError(
            f"{where} has token {tokens[tuple(at)]} at position {at.tolist() if len(at) > 1 else at[0]}; "
            f"tokens of this model are 0 to {vocab_size - 1}"
        )


def decode(where: str, tensor: Tensor) -> np.ndarray:
    kind = np.dtype(tensor.dtype).newbyteorder("<")
    wanted = math.prod(tensor.shape) * kind.itemsize
    if len(tensor.data) != wanted:
        raise UserError(
            f"{where} holds {len(tensor.data)} bytes; "
            f"shape {list(tensor.shape)} of {tensor.dtype} needs {wanted}"
        )
    return np.frombuffer(tensor.data, kind).reshape(tensor.shape)
