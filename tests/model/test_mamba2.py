"""Mamba-2 in chunks equals its rule token by token, with segments and from any state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tinsmith.model import mamba2
from tinsmith.model.config import Mamba2
from tinsmith.model.states import State

from tests.model.costs import cost

G, R, P, N = 2, 3, 5, 7
MAMBA = Mamba2(hidden=16, heads=G * R, head_dim=P, groups=G, state_dim=N, taps=4, least_step=0.1)
LENGTHS = (150, 1, 100, 3)  # segments over the borders of chunks, and shorter than the convolution
RNG = np.random.default_rng(1)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


A_LOG, DT_BIAS = normal(G * R), normal(G * R)
WEIGHTS = mamba2.Weights(normal(MAMBA.channels, 1, 4), normal(MAMBA.channels), normal(G * R))


def random_inputs(T):
    return normal(1, T, MAMBA.channels), normal(1, T, G * R)


def by_the_rule(xbc, dt):
    """Compute one sequence in float64, token by token: the formulas of arXiv:2405.21060 in a loop."""
    kernel, bias, skip, a_log, dt_bias = (np.asarray(x, np.float64) for x in (*WEIGHTS, A_LOG, DT_BIAS))
    padded = np.concatenate([np.zeros((3, xbc.shape[1])), xbc])
    mixed = sum(padded[i : i + len(xbc)] * kernel[:, 0, i] for i in range(4)) + bias
    mixed = mixed / (1 + np.exp(-mixed))
    steps = np.maximum(np.log1p(np.exp(dt + dt_bias)), 0.1)
    S, out = np.zeros((G * R, P, N)), []
    for row, step in zip(mixed, steps, strict=True):
        x, b, c = np.split(row, (G * R * P, G * R * P + G * N))
        x = x.reshape(G * R, P)
        b, c = (np.repeat(y.reshape(G, N), R, axis=0) for y in (b, c))
        S = np.exp(-np.exp(a_log) * step)[:, None, None] * S + (step[:, None] * x)[..., None] * b[:, None]
        out.append((S * c[:, None]).sum(-1) + skip[:, None] * x)
    return np.array(out).reshape(-1, G, R, P)


def tokens(xbc, dt):
    return mamba2.tokens(MAMBA, xbc, dt, A_LOG, DT_BIAS)


def test_packed_rows_equal_the_rule_on_each_segment():
    xbc, dt = random_inputs(sum(LENGTHS))
    start = np.repeat(np.cumsum((0, *LENGTHS[:-1])), LENGTHS)
    found = np.asarray(mamba2.mix_rows(MAMBA, tokens(xbc, dt), WEIGHTS, jnp.asarray(start[None])))[0]
    for first in np.unique(start):
        at = start == first
        expected = by_the_rule(*(np.asarray(x[0], np.float64)[at] for x in (xbc, dt)))
        np.testing.assert_allclose(found[at], expected, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("cut", [1, 2, 65, 180])
def test_rows_go_on_from_a_state_and_single_tokens_after_them(cut):
    """A piece of a prompt is computed with padding after it, and the rest token by token."""
    T, last = 200, 190
    xbc, dt = random_inputs(T)
    expected = by_the_rule(*(np.asarray(x[0], np.float64) for x in (xbc, dt)))
    state = State(jnp.zeros((1, G, R, P, N)), jnp.zeros((1, 3, MAMBA.channels)))
    found = []
    for begin, end in ((0, cut), (cut, last)):
        piece = tokens(*(jnp.pad(x[:, begin:end], ((0, 0), (0, 7), (0, 0))) for x in (xbc, dt)))
        real = np.arange(end - begin + 7)[None] < end - begin
        out, state = mamba2.mix_on(MAMBA, piece, WEIGHTS, state, jnp.asarray(real))
        found.append(np.asarray(out)[0, : end - begin])
    for t in range(last, T):
        of = tokens(xbc[:, t : t + 1], dt[:, t : t + 1])
        out, state = mamba2.mix_one(MAMBA, of, WEIGHTS, state)
        found.append(np.asarray(out)[0])
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=3e-5, atol=3e-5)


def test_training_costs_twice_as_much_for_twice_the_tokens():
    """The cost is counted in multiplications and in numbers written."""

    def loss(xbc, dt, start):
        return (mamba2.mix_rows(MAMBA, tokens(xbc, dt), WEIGHTS, start) ** 2).sum()

    def of_training(T):
        return cost(jax.grad(loss, argnums=(0, 1)), *random_inputs(T), jnp.zeros((1, T), jnp.int32))

    assert (of_training(4096) <= 2.02 * of_training(2048)).all()
