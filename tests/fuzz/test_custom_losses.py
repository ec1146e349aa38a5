"""Graphs of custom losses, damaged in every way: a loss of bounded tensors, or a refusal that says why."""

from __future__ import annotations

import json
import random
from typing import Any

import jax
import jax.numpy as jnp
from fuzz.campaign import campaign
from fuzz.mutations import mutated_bytes, mutated_json
from tinsmith.engine import messages
from tinsmith.losses.custom.interpreter import MAX_ELEMENTS, CustomLossError, evaluate, load
from tinsmith.losses.custom.operations import FUNCTIONS, METHODS
from tinsmith.server.errors import BadRequest
from tinsmith.server.wire.requests import CreateCustomLoss

N, K = 5, 3
ARGUMENTS: list[Any] = [
    *({"ref": name} for name in ("logprobs", "weights", "table", "scalar")),
    *(0, 1, -1, 2, 7, 1 << 40, (1 << 63) - 1, 0.5, -1.5, 1e300, True, None, "mean", "shape", "T"),
    *([0], [1, 1 << 20], [{"ref": "weights"}], {"tuple": [0, 1]}, {"tuple": [{"ref": "scalar"}, 5]}),
    *({"slice": [None, 2, None]}, {"ellipsis": True}, {"float": "inf"}, {"float": "nan"}),
    *({"dtype": "int64"}, {"dtype": "float64"}, {"device": "cpu"}, {"dict": {"a": 1}}),
]
KEYWORDS = [
    "dim",
    "keepdim",
    "dtype",
    "min",
    "max",
    "unbiased",
    "correction",
    "alpha",
    "reduction",
    "size",
    "p",
]
INPUTS = [("logprobs", 1), ("weights", 1), ("table", 2), ("scalar", 0)]


def graph(rng: random.Random) -> bytes:
    """A chain of calls with arguments of every kind, some of which fit; sometimes damaged further."""
    names = [name for name, _ in INPUTS]
    nodes: list[dict[str, Any]] = [{"op": "placeholder", "name": name, "target": name} for name in names]
    for number in range(rng.randrange(1, 5)):
        op, targets = rng.choice((("call_function", FUNCTIONS), ("call_method", METHODS)))
        args = [{"ref": rng.choice(names)}]
        args += [rng.choice([*ARGUMENTS, {"ref": names[-1]}]) for _ in range(rng.randrange(3))]
        kwargs = {rng.choice(KEYWORDS): rng.choice(ARGUMENTS)} if rng.random() < 0.3 else {}
        node = {"op": op, "name": f"n{number}", "target": rng.choice(list(targets)), "args": args}
        nodes.append(node | {"kwargs": kwargs})
        names.append(node["name"])
    last = {"ref": names[-1]}
    nodes.append({"op": "call_method", "name": "loss", "target": "sum", "args": [last]})
    result = {"tuple": [{"ref": "loss"}, {"dict": {"custom/last:sum": {"ref": "loss"}}}]}
    nodes.append({"op": "output", "name": "output", "target": "output", "args": [result]})
    content: Any = {"format": 1, "nodes": nodes}
    if rng.random() < 0.4:
        content = mutated_json(rng, content)
    data = json.dumps(content).encode()
    return mutated_bytes(rng, data, 2) if rng.random() < 0.1 else data


@campaign(graph)
def test_custom_losses(data: bytes) -> None:
    try:
        loaded = load(data, INPUTS)
    except CustomLossError:
        return
    with jax.enable_x64(True):
        shapes = {"logprobs": (N,), "weights": (N,), "table": (N, K), "scalar": ()}
        values = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

        def of_logprobs(logprobs: jax.Array, others: dict[str, jax.Array]) -> Any:
            return evaluate(loaded, others | {"logprobs": logprobs})

        try:
            program = jax.value_and_grad(of_logprobs, has_aux=True)
            jaxpr, shape = jax.make_jaxpr(program, return_shape=True)(values["logprobs"], values)
        except CustomLossError:
            return
    (loss, _), gradient = shape
    assert loss.shape == ()
    assert gradient.shape == (N,)
    sizes = [variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars]
    assert max(sizes, default=0) <= MAX_ELEMENTS


def body(rng: random.Random) -> dict[str, Any]:
    inputs = [{"name": name, "rank": rank} for name, rank in INPUTS]
    content = {"session_id": "s", "custom_loss_seq_id": 0, "name": "f", "inputs": inputs}
    return mutated_json(rng, content | {"graph": {"format": 1, "nodes": [{"op": "output"}]}})


@campaign(body)
def test_custom_loss_requests(content: dict[str, Any]) -> None:
    try:
        loss = CreateCustomLoss.model_validate(content).message()
    except (ValueError, BadRequest):  # pydantic's errors are ValueErrors
        return
    check = messages.CheckCustomLoss("r", loss)
    assert messages.decode_to_engine(messages.encode(check)) == check
    try:
        load(loss.graph, loss.inputs)
    except CustomLossError:
        return
