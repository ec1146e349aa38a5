"""Drawing tokens: distributions against exact ones, filters against a sorted reference, seeds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinsmith.model import token_sampling
from tinsmith.model.token_sampling import SamplingRows, sample_tokens


def rows_of(S, *, temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0):
    return SamplingRows(
        temperature=jnp.full(S, temperature, jnp.float32),
        top_k=jnp.full(S, top_k, jnp.int32),
        top_p=jnp.full(S, top_p, jnp.float32),
        min_p=jnp.full(S, min_p, jnp.float32),
    )


def draw(z, rows, seed=0, want_top=False):
    u = token_sampling.uniforms(seed, 0, 0, z.shape[0])
    return jax.jit(sample_tokens)(z, rows, u, jnp.bool_(want_top))


def filtered_distribution(z, temperature, top_k, top_p):
    """Return what top_k and then top_p leave of softmax(z / temperature): one token at a time, by sorting."""
    z = z.astype(np.float64) / temperature
    order = np.argsort(-z, kind="stable")
    if top_k > 0:
        order = order[:top_k]
    p = np.exp(z[order] - z.max())
    p /= p.sum()
    kept, mass = [], 0.0
    for token, probability in zip(order, p, strict=True):
        if mass >= top_p and kept:
            break
        kept.append(token)
        mass += probability
    out = np.zeros(len(z))
    out[kept] = np.exp(z[kept] - z.max())
    return out / out.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, -1, 1.0), (0.6, -1, 1.0), (1.7, 5, 1.0), (1.0, -1, 0.8), (0.9, 100, 0.9), (1.3, 120, 0.97)],
)
def test_frequencies_are_those_of_the_exact_distribution(temperature, top_k, top_p):
    V, draws = 300, 20_000
    z = np.random.default_rng(3).normal(size=V).astype(np.float32) * 2
    expected = filtered_distribution(z, temperature, top_k, top_p)
    rows = rows_of(draws, temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = np.asarray(draw(jnp.broadcast_to(z, (draws, V)), rows, seed=17).tokens)
    counts = np.bincount(tokens, minlength=V)
    assert not counts[expected == 0].any(), "a token was drawn that the filters remove"
    # Pearson's chi-square over the cells with enough expectation; z-score of the statistic below 5
    cells = expected * draws >= 5
    observed = np.append(counts[cells], draws - counts[cells].sum())
    wanted = np.append(expected[cells], 1 - expected[cells].sum()) * draws
    observed, wanted = observed[wanted > 1], wanted[wanted > 1]
    chi2, freedom = ((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    assert (chi2 - freedom) / np.sqrt(2 * freedom) < 5


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.floats(0.01, 8.0),
    top_k=st.integers(-1, 160),
    top_p=st.floats(0.01, 1.0),
)
def test_the_threshold_keeps_what_sorting_keeps(seed, spread, top_k, top_p):
    z = (np.random.default_rng(seed).normal(size=(2, 150)) * spread).astype(np.float32)
    K = min(token_sampling.TOP_K, z.shape[1])
    threshold = np.asarray(
        jax.jit(token_sampling.keep_threshold)(
            jnp.asarray(z),
            jax.lax.top_k(jnp.asarray(z), K)[0],
            jnp.full(2, top_k, jnp.int32),
            jnp.full(2, top_p, jnp.float32),
        )
    )
    for row in range(2):
        # rounding decides where the mass meets top_p almost exactly: either side of it is right
        least = filtered_distribution(z[row], 1.0, top_k, min(top_p, 1.0) - 1e-5) > 0
        most = filtered_distribution(z[row], 1.0, top_k, min(top_p + 1e-5, 1.0)) > 0
        kept = z[row] >= threshold[row]
        assert (kept >= least).all()
        if top_p < 1.0:
            assert (kept <= most).all()


def test_greedy_takes_the_argmax_whatever_the_filters_and_reports_the_untempered_logprob():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 90)), jnp.float32)
    drawn = draw(z, rows_of(4, temperature=0.0, top_k=3, top_p=0.1))
    np.testing.assert_array_equal(drawn.tokens, np.argmax(z, -1))
    np.testing.assert_allclose(drawn.logprobs, np.max(jax.nn.log_softmax(z), -1), atol=1e-6)


def test_logprobs_are_of_the_tempered_distribution_before_the_filters():
    z = jnp.asarray(np.random.default_rng(1).normal(size=(8, 200)) * 3, jnp.float32)
    drawn = draw(z, rows_of(8, temperature=0.7, top_k=4), want_top=True)
    reference = np.asarray(jax.nn.log_softmax(z / 0.7))
    np.testing.assert_allclose(drawn.logprobs, reference[np.arange(8), drawn.tokens], atol=1e-5)
    np.testing.assert_array_equal(drawn.top_tokens[:, 0], reference.argmax(-1))
    np.testing.assert_allclose(
        drawn.top_logprobs, -np.sort(-reference)[:, : drawn.top_logprobs.shape[1]], atol=1e-5
    )


def test_a_draw_depends_on_seed_sample_and_position_alone():
    whole = token_sampling.uniforms(2**63 + 5, 3, 10, 40)
    pieces = [token_sampling.uniforms(2**63 + 5, 3, 10 + at, 8) for at in range(0, 40, 8)]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))
    for other in [(2**63 + 5, 4, 10), (2**63 + 6, 3, 10), (5, 3, 10), (2**63 + 5, 3, 11)]:
        assert (token_sampling.uniforms(*other, 40) != whole).any(axis=1).all(), other
    assert whole.dtype == np.float32
    many = token_sampling.uniforms(1, 0, 0, 100_000)
    assert many.min() >= 0
    assert many.max() < 1
    counts = np.histogram2d(many[:, 0], many[:, 1], bins=8, range=[[0, 1], [0, 1]])[0]
    chi2 = ((counts - 1562.5) ** 2 / 1562.5).sum()
    assert chi2 < 63 + 5 * np.sqrt(2 * 63), "uniform, and the two independent of each other"


def test_tokens_of_no_probability_are_never_drawn():
    V = 1000
    z = np.full(V, -np.inf, np.float32)
    z[[0, 255, 256, 700]] = 0.0
    drawn = draw(jnp.broadcast_to(jnp.asarray(z), (5000, V)), rows_of(5000)).tokens
    assert set(np.asarray(drawn).tolist()) == {0, 255, 256, 700}
    extremes = token_sampling.invert_cdf(
        jnp.exp(jnp.broadcast_to(jnp.asarray(z), (2, V))), jnp.array([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24]])
    )
    np.testing.assert_array_equal(extremes, [0, 700])


def test_new_parameters_compile_nothing():
    z = jnp.zeros((2, 64), jnp.float32)
    function = jax.jit(lambda *arguments: sample_tokens(*arguments))
    for temperature, top_k, top_p in [(1.0, -1, 1.0), (0.0, 4, 0.5), (0.3, 100, 1.0), (2.0, -1, 0.2)]:
        function(
            z,
            rows_of(2, temperature=temperature, top_k=top_k, top_p=top_p),
            jnp.full((2, 2), 0.5),
            jnp.bool_(False),
        )
    assert function._cache_size() == 1


def test_min_p_removes_what_is_less_likely_than_its_share_of_the_most_likely():
    draws, z = 20_000, np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))
    for min_p, kept in ((0.0, 5), (0.2, 4), (0.3, 3), (1.0, 1)):
        drawn = draw(jnp.broadcast_to(z, (draws, 5)), rows_of(draws, min_p=min_p), seed=3)
        counts = np.bincount(np.asarray(drawn.tokens), minlength=5)
        p = np.exp(z[:kept]) / np.exp(z[:kept]).sum()
        assert not counts[kept:].any()
        np.testing.assert_allclose(counts[:kept] / draws, p, atol=0.02)
        np.testing.assert_allclose(drawn.logprobs, z[np.asarray(drawn.tokens)], atol=1e-5)


@pytest.mark.parametrize("top_p", [1e-50, 1e-38, 1e-9])
@pytest.mark.parametrize("top_k", [-1, 3, 100, 2**31 - 1])
def test_the_least_top_p_keeps_the_most_likely_token(top_p, top_k):
    """Also beside a row whose filters need the bisection."""
    z = jnp.asarray(np.random.default_rng(4).normal(size=(2, 300)), jnp.float32)
    rows = rows_of(2, top_k=top_k, top_p=top_p)._replace(
        top_k=jnp.array([top_k, 200], jnp.int32), top_p=jnp.array([top_p, 0.99], jnp.float32)
    )
    for seed in range(20):
        assert draw(z, rows, seed).tokens[0] == np.argmax(z[0])


def test_temperatures_beyond_float32_are_their_limits():
    draws, z = 20_000, np.array([1.0, 3.0, -2.0, 2.0], np.float32)
    logits = jnp.broadcast_to(z, (draws, 4))
    for tiny in (5e-324, 1e-50, 1e-45, 1e-38, 1e-30):
        drawn = draw(
            logits, rows_of(draws, temperature=token_sampling.float32_temperature(tiny)), want_top=True
        )
        assert (np.asarray(drawn.tokens) == 1).all()
        assert not np.asarray(drawn.logprobs).any(), "the tempered distribution has the other tokens no more"
    for huge in (1e30, 1e38, 1e39, 1e300):
        drawn = draw(logits, rows_of(draws, temperature=token_sampling.float32_temperature(huge)))
        np.testing.assert_allclose(drawn.logprobs, np.log(0.25), atol=1e-6)
        np.testing.assert_allclose(np.bincount(drawn.tokens, minlength=4) / draws, 0.25, atol=0.02)
    assert token_sampling.float32_temperature(0.0) == 0
