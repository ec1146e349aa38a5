"""The decode program: what it does not compute anew for each token and layer. Its results: tests/engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tinsmith.model import kv_cache
from tinsmith.model.decode import DecodeRows, decode
from tinsmith.model.token_sampling import Drawing, SamplingRows

S, P, M = 2, 1, 4


def some_rows():
    return DecodeRows(
        last_token=np.full(S, 5, np.int32),
        position=np.full(S, 3, np.int32),
        table=np.arange(1, 1 + S * P, dtype=np.int32).reshape(S, P),
        adapter=np.zeros(S, np.int32),
        budget=np.full(S, M, np.int32),
        stop_tokens=np.full((S, 8), -1, np.int32),
        sampling=SamplingRows(np.ones(S, np.float32), np.full(S, -1, np.int32), *np.ones((2, S), np.float32)),
        u=np.zeros((M, S, 2), np.float32),
        penalties=None,
    )


def test_rotations_are_computed_once(tiny):
    model = tiny("llama")
    cache = kv_cache.make_cache(model.config, 1 + S * P, 16, jnp.float32)
    program = decode.lower(model.graph, model.base, cache, None, some_rows(), np.bool_(False))
    text = program.compile().as_text()
    assert model.config.num_layers > 1
    assert (text.count(" cosine("), text.count(" sine(")) == (1, 1)


@pytest.mark.parametrize("drawing", [Drawing.PLAIN, Drawing.FILTERED])
def test_nothing_waits_for_the_host_between_tokens(tiny, drawing):
    """A GPU waits at each branch, and at each turn of a loop whose end is computed."""
    model = tiny("llama")
    cache = kv_cache.make_cache(model.config, 1 + S * P, 16, jnp.float32, backend="gpu")
    program = jax.make_jaxpr(decode, static_argnums=(0, 6))(
        model.graph, model.base, cache, None, some_rows(), np.bool_(True), drawing
    )
    operations = set(_operations(program.jaxpr))
    assert {"scan", "pallas_call", "dot_general"} <= operations
    assert not operations & {"cond", "while"}


def _operations(jaxpr):
    """The names of all operations outside of kernels."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        if equation.primitive.name != "pallas_call":
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _operations(inner)
