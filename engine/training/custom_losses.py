"""Custom losses that clients uploaded: decoded once, differentiated and compiled once per shape.

If the loss allows it, datums are padded to few lengths. Losses are computed on the CPU, which has torch's
64-bit types, whatever device the model is on: a loss reads only a datum's log-probs. `differentiate` runs in
a separate process (`custom_loss_worker`). The least recently used programs are dropped.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ...losses.custom import interpreter
from ...losses.custom.cost import estimate
from ...losses.custom.padding import evaluate_padded
from .. import messages
from ..errors import UserError

log = logging.getLogger(__name__)

_GRAPHS, _PROGRAMS = 64, 512  # kept
_MAX_OPERATIONS = 1 << 34  # of one datum's loss and gradient: a few seconds or less
MAX_BYTES = 2 << 30  # of one datum's intermediate values
_SHORTEST = 64  # of the padded lengths, which are powers of two


@dataclass(frozen=True)
class Differentiated:
    """The result for one datum: the loss, its gradient by the log-probs, and the metrics by their wire
    names."""

    loss: float
    gradient: np.ndarray
    metrics: dict[str, float]


class CustomLosses:
    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, interpreter.Graph] = OrderedDict()
        self._programs: OrderedDict[Hashable, Any] = OrderedDict()

    def graph(self, loss: messages.CustomLoss) -> interpreter.Graph:
        """Decode a loss, or return it from the cache (see `load`)."""
        return _recent(self._graphs, (loss.graph, tuple(loss.inputs)), _GRAPHS, lambda: load(loss))

    def differentiate(
        self, loss: messages.CustomLoss, logprobs: np.ndarray, inputs: dict[str, np.ndarray]
    ) -> Differentiated:
        """Compute a datum's loss and gradient. Raises UserError if that is impossible for these shapes."""
        graph = self.graph(loss)
        length = len(logprobs)
        along = frozenset(name for name, value in inputs.items() if value.shape[:1] == (length,)) | {
            "logprobs"
        }
        values = {"logprobs": logprobs, **inputs}
        padded = {name: _padded(value) if name in along else value for name, value in values.items()}
        with jax.enable_x64(True), jax.default_device(_device()):
            of = (loss.graph, tuple(loss.inputs))
            shapes = (of, along, *((value.shape, value.dtype.str) for value in padded.values()))
            program = _recent(
                self._programs, shapes, _PROGRAMS, lambda: _compile_padded(graph, padded, along)
            )
            if program is not None:
                (value, metrics), gradient = program(padded, np.int64(length))
            else:
                exact = (of, *((value.shape, value.dtype.str) for value in values.values()))
                program = _recent(self._programs, exact, _PROGRAMS, lambda: _compile(graph, values))
                (value, metrics), gradient = program(values)
            return Differentiated(
                float(value),
                np.asarray(gradient, np.float32)[:length],
                {key: float(metric) for key, metric in metrics.items()},
            )


def load(loss: messages.CustomLoss) -> interpreter.Graph:
    """Decode a loss's graph. Raises UserError naming the node that is not supported."""
    try:
        return interpreter.load(loss.graph, loss.inputs)
    except interpreter.CustomLossError as error:
        raise UserError(f"custom loss {loss.name!r}: {error}") from None


def check(loss: messages.CustomLoss) -> messages.Nothing:
    """Raise UserError for a loss that `load` refuses."""
    load(loss)
    return messages.Nothing()


def _compile(graph: interpreter.Graph, values: dict[str, np.ndarray]) -> Any:
    def of_logprobs(logprobs: jax.Array, others: dict[str, jax.Array]) -> Any:
        return interpreter.evaluate(graph, others | {"logprobs": logprobs})

    def differentiated(values: dict[str, jax.Array]) -> Any:
        return jax.value_and_grad(of_logprobs, has_aux=True)(values["logprobs"], values)

    began = time.perf_counter()
    try:
        program = _compiled(jax.jit(differentiated).trace(values))
    except interpreter.CustomLossError as error:
        raise UserError(str(error)) from None
    log.debug("a custom loss of %d nodes compiled in %.2f s", len(graph.nodes), time.perf_counter() - began)
    return program


def _compile_padded(
    graph: interpreter.Graph, values: dict[str, np.ndarray], along_tokens: frozenset[str]
) -> Any | None:
    """Compile for a padded length; None if the loss depends on the datum's length."""

    def of_logprobs(logprobs: jax.Array, others: dict[str, jax.Array], length: jax.Array) -> Any:
        return evaluate_padded(graph, others | {"logprobs": logprobs}, along_tokens, length)

    def differentiated(values: dict[str, jax.Array], length: jax.Array) -> Any:
        return jax.value_and_grad(of_logprobs, has_aux=True)(values["logprobs"], values, length)

    try:
        return _compiled(jax.jit(differentiated).trace(values, np.int64(0)))
    except (
        interpreter.NotPaddableError,
        interpreter.CustomLossError,
    ):  # compiled again without padding, which reports the error
        return None


def _compiled(program: jax.stages.Traced) -> jax.stages.Compiled:
    """Compile a program. Raises UserError if it needs more than a datum's seconds, or too much memory."""
    cost = estimate(program.jaxpr.jaxpr)
    if cost > _MAX_OPERATIONS:
        raise UserError(
            f"it takes as long as {cost:.2g} floating point operations for one datum; {_MAX_OPERATIONS:.2g} "
            "is the limit"
        )
    compiled = program.lower().compile()
    memory = compiled.memory_analysis()
    if memory is not None and memory.temp_size_in_bytes > MAX_BYTES:
        raise UserError(
            f"its intermediate values take {memory.temp_size_in_bytes / 2**30:.2g} GiB for one datum; "
            f"{MAX_BYTES / 2**30:.2g} GiB is the limit"
        )
    return compiled


def _padded(value: np.ndarray) -> np.ndarray:
    """Repeat the last token up to one of few lengths."""
    length = max(_SHORTEST, 1 << (len(value) - 1).bit_length())
    return np.concatenate([value, np.repeat(value[-1:], length - len(value), axis=0)])


def _recent(kept: OrderedDict[Hashable, Any], key: Hashable, most: int, make: Callable[[], Any]) -> Any:
    if key not in kept:
        kept[key] = make()
        if len(kept) > most:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


def _device() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        return jax.local_devices()[0]
