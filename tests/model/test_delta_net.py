"""The gated delta rule in chunks equals the rule token by token, with segments and from any state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tinsmith.model import delta_net, states
from tinsmith.model.config import DeltaNet
from tinsmith.model.states import State

from tests.model.costs import cost

NET = DeltaNet(hidden=16, key_heads=2, value_heads=4, key_dim=8, value_dim=6, taps=4)
G, R, K, V = 2, 2, 8, 6
LENGTHS = (70, 1, 60, 3)  # segments over the borders of chunks, and shorter than the convolution


def random_tokens(T, seed=0):
    rng = np.random.default_rng(seed)
    return delta_net.Tokens(
        jnp.asarray(rng.standard_normal((1, T, NET.channels)), jnp.float32),
        -jnp.asarray(rng.uniform(0, 3, (1, T, G, R)), jnp.float32),
        jnp.asarray(rng.uniform(0, 1, (1, T, G, R)), jnp.float32),
    )


KERNEL = jnp.asarray(np.random.default_rng(1).standard_normal((NET.channels, 1, 4)), jnp.float32)


def by_the_rule(qkv, decay, rate):
    """One sequence in float64, token by token: the formulas of arXiv:2412.06464 in a loop."""
    padded = np.concatenate([np.zeros((3, qkv.shape[1])), qkv])
    mixed = sum(padded[i : i + len(qkv)] * np.asarray(KERNEL)[:, 0, i] for i in range(4))
    mixed = mixed / (1 + np.exp(-mixed))
    S, out = np.zeros((G, R, K, V)), []
    for x, g, beta in zip(mixed, decay, rate, strict=True):
        q, k, v = np.split(x, (G * K, 2 * G * K))
        q, k = (
            y.reshape(G, K) / np.sqrt((y.reshape(G, K) ** 2).sum(-1, keepdims=True) + 1e-6) for y in (q, k)
        )
        S = S * np.exp(g)[..., None, None]
        u = beta[..., None] * (v.reshape(G, R, V) - np.einsum("grkv,gk->grv", S, k))
        S = S + np.einsum("gk,grv->grkv", k, u)
        out.append(np.einsum("grkv,gk->grv", S, q) / np.sqrt(K))
    return np.array(out)


def test_packed_rows_equal_the_rule_on_each_segment():
    T = sum(LENGTHS)
    of, start = random_tokens(T), np.repeat(np.cumsum((0, *LENGTHS[:-1])), LENGTHS)
    found = np.asarray(delta_net.mix_rows(NET, of, KERNEL, jnp.asarray(start[None])))[0]
    for first in np.unique(start):
        at = start == first
        expected = by_the_rule(*(np.asarray(x[0], np.float64)[at] for x in of))
        np.testing.assert_allclose(found[at], expected, atol=2e-6)


def test_strong_decays_take_no_digits_from_weak_ones_after_them():
    """Between two tokens, the sum of decays is exact to float32's rounding, however much decayed before."""
    decay = -np.random.default_rng(2).choice([0.013, 15.1], (1, 64, G, R)).astype(np.float32)
    sums = np.moveaxis(np.cumsum(decay.astype(np.float64), axis=1), 1, -1)
    _, between = states.accumulated(jnp.asarray(decay))
    np.testing.assert_allclose(between, sums[..., :, None] - sums[..., None, :], rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("cut", [1, 2, 65, 100])
def test_rows_go_on_from_a_state_and_single_tokens_after_them(cut):
    """A piece of a prompt with padding after it, the rest token by token."""
    T = 110
    of = random_tokens(T)
    expected = by_the_rule(*(np.asarray(x[0], np.float64) for x in of))
    state = State(jnp.zeros((1, G, R, K, V)), jnp.zeros((1, 3, NET.channels)))
    found = []
    for begin, end in ((0, cut), (cut, 104)):
        piece = delta_net.Tokens(
            *(jnp.pad(x[:, begin:end], ((0, 0), (0, 7), *((0, 0),) * (x.ndim - 2))) for x in of)
        )
        real = np.arange(end - begin + 7)[None] < end - begin
        out, state = delta_net.mix_on(NET, piece, KERNEL, state, jnp.asarray(real))
        found.append(np.asarray(out)[0, : end - begin])
    for t in range(104, T):
        out, state = delta_net.mix_one(NET, delta_net.Tokens(*(x[:, t : t + 1] for x in of)), KERNEL, state)
        found.append(np.asarray(out)[0])
    np.testing.assert_allclose(np.concatenate(found), expected, atol=2e-6)


def test_training_costs_twice_as_much_for_twice_the_tokens():
    """The cost is counted in multiplications and in numbers written."""

    def of_training(T):
        gradient = jax.grad(lambda *args: (delta_net.mix_rows(NET, *args) ** 2).sum(), allow_int=True)
        return cost(gradient, random_tokens(T), KERNEL, jnp.zeros((1, T), jnp.int32))

    assert (of_training(4096) <= 2.02 * of_training(2048)).all()
