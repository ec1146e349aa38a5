"""Datums whose inputs are laid out otherwise than position i predicting `target_tokens[i]`.

Three layouts of N tokens (`messages.TargetAlignment`), of one neutral datum that the trainer knows:

    shifted   target_tokens[N]: position i predicts target i; N log-probs
    labels    labels[N]: label i is what token i should be, so position i - 1 predicts it; N - 1 log-probs
    tail      target_tokens[k], k < N, are the last k tokens: position N - k + j - 1 predicts target j;
              k log-probs

A label or target of -100 is none: it has no weight, and its log-prob is given as 0. Where no weights are
sent, all targets have weight 1. A `mask` multiplies the weights (or the advantages).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ...losses import Loss
from ..errors import UserError
from ..messages import Datum, Tensor
from .validation import EXPERTS, decode

IGNORED = -100
_NAMES = {"old_logprobs": "logprobs", "target": "target_tokens", "weight": "weights"}


@dataclass(frozen=True)
class Aligned:
    """A datum in the trainer's layout, with the positions in `rows` whose log-probs the client gets, those of
    `ignored` as 0."""

    datum: Datum
    rows: slice
    ignored: np.ndarray | None = None  # bool, like the targets

    def answered(self, logprobs: np.ndarray) -> np.ndarray:
        """Select the client's log-probs: [N] or [N, K]."""
        if self.ignored is not None:
            logprobs = np.where(self.ignored.reshape(logprobs.shape), np.float32(0), logprobs)
        return logprobs[self.rows]


def align(index: int, datum: Datum, loss: Loss) -> Aligned:
    """Bring a datum into the trainer's layout. Raises UserError for inputs of no layout, or of two.

    The contents of the inputs are checked afterwards.
    """
    about_tokens = {name: tensor for name, tensor in datum.inputs.items() if name == EXPERTS}
    inputs = _renamed(index, {n: tensor for n, tensor in datum.inputs.items() if n not in about_tokens})
    _check_spelling(index, inputs, loss)
    length = len(datum.tokens) // 4
    rows = slice(0, length)
    if "labels" in inputs:
        if "target_tokens" in inputs:
            raise UserError(f"datum {index}: loss_fn_inputs has target_tokens and labels; send one of them")
        inputs = _shifted(index, inputs, length)
        rows = slice(0, length - 1)
    else:
        targets = inputs.get("target_tokens")
        if targets is not None and loss.valid == "weights" and not {"weights", "mask"} & inputs.keys():
            ones = np.ones(targets.shape, "<f4")
            inputs["weights"] = Tensor("float32", tuple(targets.shape), ones.tobytes())
        if targets is not None and len(targets.shape) == 1 and 0 < targets.shape[0] < length:
            rows = slice(length - targets.shape[0] - 1, length - 1)
            inputs = _spread(index, datum.tokens, inputs, length, rows)
    inputs, ignored = _without_ignored(index, _masked(index, inputs, loss), loss)
    return Aligned(Datum(datum.tokens, inputs | about_tokens), rows, ignored)


def _renamed(index: int, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, usual in _NAMES.items():
        if name in inputs and usual in inputs:
            raise UserError(f"datum {index}: loss_fn_inputs has {name} and {usual}, which are the same")
    return {_NAMES.get(name, name): tensor for name, tensor in inputs.items()}


def _check_spelling(index: int, inputs: dict[str, Tensor], loss: Loss) -> None:
    """Raise UserError for an unknown input that is spelled almost like an optional one that is absent.

    Other unknown inputs are ignored, because the same datum may be sent with several losses.
    """
    optional = ("mask", "weights") if loss.valid == "weights" else ("mask",)
    absent = frozenset(optional).difference(inputs)
    for name in inputs:
        if (near := _nearest(name, absent)) is not None:
            raise UserError(f"datum {index}: loss_fn_inputs[{name!r}] is unknown; did you mean {near!r}?")


@lru_cache(1024)  # the datums of a batch have the same few names
def _nearest(name: str, absent: frozenset[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, absent, 1, cutoff=0.75)), None)


def _shifted(index: int, inputs: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Turn inputs about the tokens themselves into inputs about the positions before them."""
    for name, tensor in inputs.items():
        if tuple(tensor.shape) != (length,):
            raise UserError(
                f"datum {index}: loss_fn_inputs[{name!r}] has shape {list(tensor.shape)}; with labels every "
                f"input is about the {length} tokens of model_input, so it must be [{length}]"
            )
    none = {"labels": IGNORED}
    moved = {
        name: _tensor(np.append(_array(index, name, tensor)[1:], none.get(name, 0)), tensor)
        for name, tensor in inputs.items()
    }
    moved["target_tokens"] = moved.pop("labels")
    if "weights" not in moved:
        moved["weights"] = Tensor("float32", (length,), np.ones(length, "<f4").tobytes())
    return moved


def _spread(
    index: int, tokens: bytes, inputs: dict[str, Tensor], length: int, rows: slice
) -> dict[str, Tensor]:
    """Place inputs about the last tokens, with zeros before and after them."""
    count = rows.stop - rows.start
    own = np.frombuffer(tokens, "<i4")[-count:]
    targets = _array(index, "target_tokens", inputs["target_tokens"])
    differ = np.flatnonzero((targets != own) & (targets != IGNORED))
    if len(differ):
        at = differ[0]
        raise UserError(
            f"datum {index}: loss_fn_inputs['target_tokens'] has shape [{count}] and model_input {length} "
            f"tokens: it must be [{length}], or the last {count} of these tokens; but it has {targets[at]} "
            f"at position {at}, where model_input ends with {own[at]}"
        )
    spread = {}
    for name, tensor in inputs.items():
        if tuple(tensor.shape) != (count,):
            raise UserError(
                f"datum {index}: loss_fn_inputs[{name!r}] has shape {list(tensor.shape)}; target_tokens are "
                f"the last {count} tokens, so it must be [{count}]"
            )
        values = _array(index, name, tensor)
        whole = np.full(length, IGNORED if name == "target_tokens" else 0, values.dtype)
        whole[rows] = values
        spread[name] = _tensor(whole, tensor)
    return spread


def _masked(index: int, inputs: dict[str, Tensor], loss: Loss) -> dict[str, Tensor]:
    mask, weights = inputs.get("mask"), inputs.get(loss.valid)
    if mask is None:
        return inputs
    inputs = {name: tensor for name, tensor in inputs.items() if name != "mask"}
    values = _array(index, "mask", mask).astype(np.float32)
    if weights is None and loss.valid == "weights":
        return inputs | {loss.valid: Tensor("float32", values.shape, values.astype("<f4").tobytes())}
    if weights is None:
        return inputs  # a later check names what is missing
    if values.shape != tuple(weights.shape):
        raise UserError(
            f"datum {index}: loss_fn_inputs['mask'] has shape {list(values.shape)}, {loss.valid} "
            f"{list(weights.shape)}: it must be the same"
        )
    weighted = np.where(values == 0, 0, values * _array(index, loss.valid, weights))  # 0 · NaN is not 0
    return inputs | {loss.valid: _tensor(weighted, weights)}


def _without_ignored(
    index: int, inputs: dict[str, Tensor], loss: Loss
) -> tuple[dict[str, Tensor], np.ndarray | None]:
    """Replace targets of -100 by token 0 without a weight; return where they were."""
    tensor = inputs.get("target_tokens")
    if tensor is None or tensor.dtype not in ("int64", "int32"):
        return inputs, None
    targets = _array(index, "target_tokens", tensor)
    ignored = targets == IGNORED
    if not ignored.any():
        return inputs, None
    inputs = inputs | {"target_tokens": _tensor(np.where(ignored, 0, targets), tensor)}
    weights = inputs.get(loss.valid)
    if weights is None and loss.valid in loss.defaults:
        ones = np.full(targets.shape, loss.defaults[loss.valid], "<f4")
        weights = Tensor("float32", targets.shape, ones.tobytes())
    if (
        weights is not None and tuple(weights.shape) == targets.shape
    ):  # otherwise a later check says what is wrong
        values = _array(index, loss.valid, weights)
        inputs[loss.valid] = _tensor(np.where(ignored, np.zeros_like(values), values), weights)
    return inputs, ignored


def _array(index: int, name: str, tensor: Tensor) -> np.ndarray:
    return decode(f"datum {index}: loss_fn_inputs[{name!r}]", tensor)


def _tensor(values: np.ndarray, like: Tensor) -> Tensor:
    kind = np.dtype(like.dtype).newbyteorder("<")
    return Tensor(like.dtype, values.shape, np.ascontiguousarray(values, kind).tobytes())
