"""The estimate of a custom loss's work, compared with the time that it takes."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from tinsmith.losses.custom.cost import estimate
from tinsmith.losses.custom.operations import METHODS

SIDE = 512


def index(x):
    return jnp.argsort(x[0])


FUNCTIONS = {
    "exp": lambda x: METHODS["exp"](x),
    "remainder": lambda x: METHODS["remainder"](x, 0.3),
    "pow": lambda x: METHODS["pow"](jnp.abs(x), x),
    "sum": lambda x: METHODS["sum"](x, 0),
    "log_softmax": lambda x: METHODS["log_softmax"](x, 0),
    "argmax": lambda x: METHODS["argmax"](x, 0) * x[0],
    "transpose": lambda x: METHODS["transpose"](x, 0, 1) * x,
    "index_select": lambda x: METHODS["index_select"](x, 1, index(x)),
    "gather": lambda x: METHODS["gather"](x, 0, jnp.broadcast_to(index(x)[:, None], x.shape)),
    "repeat": lambda x: METHODS["repeat"](x, 8, 1),
    "cat": lambda x: METHODS["cat"]([x] * 8, 1),
    "sort": lambda x: METHODS["sort"](x, 0).values,
    "topk": lambda x: METHODS["topk"](x, 3).values,
    "cumsum": lambda x: METHODS["cumsum"](x, 0) * x,
    "cumprod": lambda x: METHODS["cumprod"](x, 0),
    "logcumsumexp": lambda x: METHODS["logcumsumexp"](x, 1),
    "matmul": lambda x: METHODS["matmul"](x, x),
    "bmm": lambda x: METHODS["bmm"](x.reshape(-1, 4, 4), x.reshape(-1, 4, 4)),
}


def test_no_function_takes_much_longer_than_its_estimate_says():
    """Times are one core's, compared with the median of all functions."""
    x = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, (SIDE, SIDE)), jnp.float32)
    seconds = {}
    for name, function in FUNCTIONS.items():
        program = jax.jit(jax.value_and_grad(lambda x, function=function: jnp.sum(function(x) ** 2))).trace(x)
        work = estimate(program.jaxpr.jaxpr)
        compiled = program.lower().compile()
        jax.block_until_ready(compiled(x))
        times = []
        for _ in range(5):
            began = time.process_time()
            jax.block_until_ready(compiled(x))
            times.append(time.process_time() - began)
        seconds[name] = min(times) / work
    median = np.median(list(seconds.values()))
    relative = {name: float(each / median) for name, each in seconds.items()}
    assert max(relative.values()) < 16, relative
