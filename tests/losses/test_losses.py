"""Every loss and its gradient against formulas written again in NumPy, and finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tinsmith.losses import FUNCTIONS, MAX_CONFIG, REGISTRY, drgrpo, loss_and_slope
from tinsmith.losses.gspo import sequence_log_ratio

RNG = np.random.default_rng(0)
N = 200
LOGPROBS = -RNG.exponential(1.0, N)
INPUTS = {
    "weights": RNG.normal(size=N),
    "logprobs": LOGPROBS + RNG.normal(size=N) * 0.4,
    "advantages": RNG.normal(size=N) * (RNG.random(N) < 0.8),
    "sequence_log_ratio": np.repeat(RNG.normal(size=4) * 5e-4, N // 4),
    "reference_logprobs": LOGPROBS + RNG.normal(size=N) * 0.5,
}
LOSSES = {**REGISTRY, "drgrpo_sequence": drgrpo.SEQUENCE}


COMPILED = jax.jit(partial(loss_and_slope, FUNCTIONS))


def ratio(lp, i):
    return np.exp(lp - i["logprobs"])


def clip(x, low, high):
    return np.maximum(np.minimum(x, high), low)


def kept(lp, i, low, high):
    return (low <= ratio(lp, i)) & (ratio(lp, i) <= high) & (i["advantages"] != 0)


def numpy_ppo(lp, i, low, high):
    r = ratio(lp, i)
    return -np.minimum(r * i["advantages"], clip(r, low, high) * i["advantages"])


def policy_terms(lp, i, low, high, dual, beta, use_tis, tis_low, tis_high):
    """Return a token's loss and its derivative by the log-prob, by branches."""
    value, slope = np.zeros(N), np.zeros(N)
    for t in range(N):
        a, r = i["advantages"][t], np.exp(lp[t] - i["logprobs"][t])
        if a == 0 or (beta and not 1 / beta <= r <= beta):
            continue
        w = 1.0
        if use_tis:
            w = min(max(np.exp(i["logprobs"][t] - i["reference_logprobs"][t]), tis_low), tis_high)
        if a > 0 and r > 1 + high:
            value[t] = -w * (1 + high) * a
        elif a < 0 and r < 1 - low:
            value[t] = -w * (1 - low) * a
        elif a < 0 and dual and r > dual:
            value[t] = -w * dual * a
        else:
            value[t] = slope[t] = -w * r * a
    return value, slope


def drgrpo_terms(log_ratio, lp, i, low, high, beta, kl_type):
    a, r = i["advantages"], np.exp(log_ratio)
    clipped = ((a > 0) & (r > 1 + high)) | ((a < 0) & (r < 1 - low))
    d = lp - i["reference_logprobs"]
    kl, kl_slope = {
        0: (d, np.ones(N)),
        1: (d**2 / 2, d),
        2: (np.exp(-d) - 1 + d, 1 - np.exp(-d)),
    }[int(kl_type)]
    value = -clip(r, 1 - low, 1 + high) * a
    value = np.where(clipped, value, -r * a) + beta * kl
    slope = np.where(clipped, 0.0, -r * a) + beta * kl_slope
    return np.where(a == 0, 0.0, value), np.where(a == 0, 0.0, slope)


# For each loss its value, and d loss / d logprob worked out by hand.
FORMULAS = {
    "cross_entropy": (lambda lp, i: -i["weights"] * lp, lambda lp, i: -i["weights"]),
    "importance_sampling": (
        lambda lp, i: -ratio(lp, i) * i["advantages"],
        lambda lp, i: -ratio(lp, i) * i["advantages"],
    ),
    "ppo": (
        numpy_ppo,
        # the gradient is that of r·A, unless the clipped branch is the smaller
        lambda lp, i, low, high: np.where(
            (ratio(lp, i) * i["advantages"]) <= clip(ratio(lp, i), low, high) * i["advantages"],
            -ratio(lp, i) * i["advantages"],
            0.0,
        ),
    ),
    "cispo": (
        lambda lp, i, low, high: -clip(ratio(lp, i), low, high) * lp * i["advantages"],
        lambda lp, i, low, high: -clip(ratio(lp, i), low, high) * i["advantages"],
    ),
    "dro": (
        lambda lp, i, beta: np.where(
            i["advantages"] == 0, 0, -(lp * i["advantages"] - beta / 2 * (lp - i["logprobs"]) ** 2)
        ),
        lambda lp, i, beta: np.where(
            i["advantages"] == 0, 0, -(i["advantages"] - beta * (lp - i["logprobs"]))
        ),
    ),
    "stable_reinforce": (
        lambda lp, i, low, high, cap, kl: np.where(
            kept(lp, i, low, high),
            -np.minimum(ratio(lp, i), cap) * i["advantages"] * lp
            + kl * (ratio(lp, i) - 1 - (lp - i["logprobs"])),
            0.0,
        ),
        lambda lp, i, low, high, cap, kl: np.where(
            kept(lp, i, low, high),
            -np.minimum(ratio(lp, i), cap) * i["advantages"] + kl * (ratio(lp, i) - 1),
            0.0,
        ),
    ),
    "gspo": (
        lambda lp, i, low, high: (
            -np.minimum(
                np.exp(i["sequence_log_ratio"]) * i["advantages"],
                clip(np.exp(i["sequence_log_ratio"]), low, high) * i["advantages"],
            )
        ),
        lambda lp, i, low, high: np.where(
            np.exp(i["sequence_log_ratio"]) * i["advantages"]
            <= clip(np.exp(i["sequence_log_ratio"]), low, high) * i["advantages"],
            -np.exp(i["sequence_log_ratio"]) * i["advantages"],
            0.0,
        ),
    ),
    "policy_loss": (lambda *args: policy_terms(*args)[0], lambda *args: policy_terms(*args)[1]),
    "drgrpo": (
        lambda lp, i, *config: drgrpo_terms(lp - i["logprobs"], lp, i, *config)[0],
        lambda lp, i, *config: drgrpo_terms(lp - i["logprobs"], lp, i, *config)[1],
    ),
    "drgrpo_sequence": (
        lambda lp, i, *config: drgrpo_terms(i["sequence_log_ratio"], lp, i, *config)[0],
        lambda lp, i, *config: drgrpo_terms(i["sequence_log_ratio"], lp, i, *config)[1],
    ),
}
FORMULAS["causallm_loss"] = FORMULAS["cross_entropy"]
FORMULAS["ppo_loss"] = FORMULAS["policy_loss"]
CONFIGS = {
    "ppo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.1},
    "cispo": {"clip_low_threshold": 0.5, "clip_high_threshold": 1.3},
    "dro": {"beta": 0.3},
    "stable_reinforce": {
        "mask_low_threshold": 0.8,
        "mask_high_threshold": 1.6,
        "truncation_threshold": 1.1,
        "kl_coeff": 0.7,
    },
    "gspo": {"clip_low_threshold": 0.9995, "clip_high_threshold": 1.0002},
    "policy_loss": {
        "eps_clip": 0.1,
        "eps_clip_high": 0.3,
        "eps_clip_c": 1.4,
        "icepop_beta": 1.8,
        "use_tis": 1.0,
        "tis_clip_low": 0.6,
        "tis_clip_high": 1.2,
    },
    "ppo_loss": {"eps_clip_c": 1.5},
    "drgrpo": {"clip_low": 0.1, "clip_high": 0.15, "beta": 0.3, "kl_type": 2.0},
    "drgrpo_sequence": {"clip_low": 2e-4, "clip_high": 3e-4, "beta": 0.3, "kl_type": 1.0},
}


def run(name, logprobs, config):
    values = np.zeros(MAX_CONFIG, np.float32)
    values[: len(config)] = list(config.values())
    as_column = lambda x: jnp.asarray(x, jnp.float32)[:, None]  # noqa: E731
    index = jnp.int32([loss.function for loss in FUNCTIONS].index(LOSSES[name].function))
    inputs = {key: as_column(value) for key, value in INPUTS.items()}
    loss, slope = COMPILED(index, as_column(logprobs), inputs, jnp.asarray(values))
    return np.asarray(loss)[:, 0], np.asarray(slope)[:, 0]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("default", [True, False])
def test_loss_and_slope_follow_the_formula(name, default):
    config = LOSSES[name].config if default else {**LOSSES[name].config, **CONFIGS.get(name, {})}
    value, derivative = FORMULAS[name]
    loss, slope = run(name, LOGPROBS, config)
    np.testing.assert_allclose(loss, value(LOGPROBS, INPUTS, *config.values()), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(slope, derivative(LOGPROBS, INPUTS, *config.values()), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kl_type", range(3))
def test_every_kl_kind_of_drgrpo(kl_type):
    config = REGISTRY["drgrpo"].config | {"beta": 0.5, "kl_type": float(kl_type)}
    value, derivative = FORMULAS["drgrpo"]
    loss, slope = run("drgrpo", LOGPROBS, config)
    np.testing.assert_allclose(loss, value(LOGPROBS, INPUTS, *config.values()), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(slope, derivative(LOGPROBS, INPUTS, *config.values()), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"eps_clip_c": 3.0}, {"icepop_beta": 2.0}, {"use_tis": 1.0}], ids=str
)
def test_policy_loss_of_ratios_that_overflow(options, monkeypatch):
    """Clipped, bounded and masked tokens have a gradient of zero, not of 0 · inf; the loss of one that
    nothing bounds is infinite, and says so."""
    for name, values in list(INPUTS.items()):
        monkeypatch.setitem(INPUTS, name, values[:3])
    monkeypatch.setitem(INPUTS, "logprobs", np.array([-200.0, -0.1, -200.0]))
    monkeypatch.setitem(INPUTS, "advantages", np.array([0.0, 1.0, -1.0]))
    bounded = "eps_clip_c" in options or "icepop_beta" in options
    loss, slope = run("policy_loss", np.array([-0.1, -200.0, -0.1]), REGISTRY["policy_loss"].config | options)
    assert loss[0] == slope[0] == 0
    assert np.isfinite([loss[1], slope[1]]).all()
    assert np.isfinite(loss[2]) == np.isfinite(slope[2]) == bounded


@pytest.mark.parametrize("placeholder", [0.0, -100.0, -1e4, 1e4, -3e38, 3e38, -np.inf, np.nan])
@pytest.mark.parametrize("name", LOSSES)
def test_a_masked_token_adds_nothing_whatever_its_log_probs(name, placeholder, monkeypatch):
    config = {**LOSSES[name].config, **CONFIGS.get(name, {})}
    masked = RNG.random(N) < 0.3
    mask = LOSSES[name].valid
    monkeypatch.setitem(INPUTS, mask, np.where(masked, 0, INPUTS[mask]))
    value, derivative = FORMULAS[name]
    want = [np.where(masked, 0, of(LOGPROBS, INPUTS, *config.values())) for of in (value, derivative)]
    for other in ("logprobs", "reference_logprobs", "sequence_log_ratio"):
        monkeypatch.setitem(INPUTS, other, np.where(masked, placeholder, INPUTS[other]))
    loss, slope = run(name, np.where(masked, placeholder, LOGPROBS), config)
    assert not np.any([loss[masked], slope[masked]])
    np.testing.assert_allclose(loss, want[0], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(slope, want[1], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("log_ratio", [-500.0, 500.0])
@pytest.mark.parametrize("name", ["ppo", "gspo", "policy_loss", "ppo_loss", "drgrpo", "drgrpo_sequence"])
def test_clipped_tokens_have_no_gradient_though_their_ratio_overflows(name, log_ratio, monkeypatch):
    for key, values in list(INPUTS.items()):
        monkeypatch.setitem(INPUTS, key, values[:2])
    lp = np.array([-1.0, -1.0])
    monkeypatch.setitem(INPUTS, "logprobs", lp - log_ratio)
    monkeypatch.setitem(INPUTS, "sequence_log_ratio", np.full(2, log_ratio))
    monkeypatch.setitem(INPUTS, "advantages", np.array([3.0, -3.0]))
    config = REGISTRY["ppo"].config | LOSSES[name].config
    low = config.get("clip_low", config.get("eps_clip"))
    high = config.get("clip_high", config.get("eps_clip_high"))
    bounds = (
        (config["clip_low_threshold"], config["clip_high_threshold"]) if low is None else (1 - low, 1 + high)
    )
    loss, slope = run(name, lp, LOSSES[name].config)
    clipped, free = (0, 1) if log_ratio > 0 else (1, 0)
    assert loss[clipped] == pytest.approx(-3 * bounds[1] if log_ratio > 0 else 3 * bounds[0], rel=1e-5)
    assert slope[clipped] == 0
    if log_ratio > 0:  # nothing bounds this one, so it fails
        assert np.isinf(loss[free])
    else:
        assert loss[free] == slope[free] == 0


@pytest.mark.parametrize("name", ["cross_entropy", "importance_sampling", "ppo", "dro"])
def test_slope_is_the_finite_difference(name):
    """This holds for the losses without a stopped gradient."""
    config = REGISTRY[name].config
    value, _ = FORMULAS[name]
    step = 1e-6
    up, down = (value(LOGPROBS + s, INPUTS, *config.values()) for s in (step, -step))
    _, slope = run(name, LOGPROBS, config)
    near_the_clip = np.abs(slope - (up - down) / (2 * step)) > 1e-3
    assert near_the_clip.mean() < 0.01
    np.testing.assert_allclose(
        slope[~near_the_clip], ((up - down) / (2 * step))[~near_the_clip], rtol=1e-3, atol=1e-4
    )


def test_defaults_are_the_documented_ones():
    assert dict(REGISTRY["ppo"].config) == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    assert dict(REGISTRY["cispo"].config) == {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}
    assert dict(REGISTRY["dro"].config) == {"beta": 0.05}
    assert dict(REGISTRY["stable_reinforce"].config) == {
        "mask_low_threshold": 0.5,
        "mask_high_threshold": 5.0,
        "truncation_threshold": 2.0,
        "kl_coeff": 0.0,
    }
    assert REGISTRY["gspo"].config["clip_low_threshold"] == pytest.approx(1 - 3e-4)
    assert REGISTRY["gspo"].config["clip_high_threshold"] == pytest.approx(1 + 4e-4)
    assert REGISTRY["gspo"].required_inputs == (
        "target_tokens",
        "logprobs",
        "advantages",
        "sequence_ratio_mask",
    )


def test_stable_reinforce_drops_what_the_sampler_would_never_draw(monkeypatch):
    """Ratios that overflow, prompts (advantage 0, log-prob 0), and the band's own edges."""
    cases = np.array([-0.1, -200.0, -8.0, np.log(0.5), np.log(0.499)])
    for name, values in list(INPUTS.items()):
        monkeypatch.setitem(INPUTS, name, values[: len(cases)])
    monkeypatch.setitem(INPUTS, "logprobs", np.array([-200.0, -0.1, 0.0, 0.0, 0.0]))
    monkeypatch.setitem(INPUTS, "advantages", np.array([1.0, -1.0, 0.0, 3.0, 3.0]))
    config = REGISTRY["stable_reinforce"].config | {"kl_coeff": 1.0, "mask_low_threshold": 0.49999}
    loss, slope = run("stable_reinforce", cases, config)
    want = -0.5 * 3 * np.log(0.5) + (0.5 - 1 - np.log(0.5))
    np.testing.assert_allclose(loss, [0, 0, 0, want, 0], rtol=1e-5)
    np.testing.assert_allclose(slope, [0, 0, 0, -1.5 - 0.5, 0], rtol=1e-5)


def test_the_sequence_ratio_is_a_mean_over_each_sequences_mask():
    lengths = [5, 3, 4]  # packed in one row of 14, two tokens of padding
    segment = np.concatenate([[0] * 5, [5] * 3, [8] * 4, [12, 13]])[None].astype(np.int32)
    lp, q = RNG.normal(size=(2, 1, 14)).astype(np.float32)
    mask = (RNG.random((1, 14)) < 0.6).astype(np.float32)
    mask[0, 5:8] = 0  # a sequence without any counted token
    got = np.asarray(sequence_log_ratio(*map(jnp.asarray, (lp, q, mask, segment))))[0]
    begin = 0
    for length in lengths:
        at = slice(begin, begin + length)
        counted = mask[0, at] != 0
        want = (lp - q)[0, at][counted].mean() if counted.any() else 0.0
        np.testing.assert_allclose(got[at], want, rtol=1e-5, atol=1e-6)
        begin += length


@pytest.mark.reference
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("default", [True, False])
def test_slopes_equal_torch_autograd(name, default):
    torch = pytest.importorskip("torch")
    lp = torch.tensor(LOGPROBS, requires_grad=True)
    i = {key: torch.tensor(value) for key, value in INPUTS.items()}
    r = torch.exp(lp - i["logprobs"])
    s = torch.exp(i["sequence_log_ratio"] + lp - lp.detach())
    A = i["advantages"]
    chosen = LOSSES[name].config if default else {**LOSSES[name].config, **CONFIGS.get(name, {})}
    config = list(chosen.values())

    def policy(low, high, dual, beta, use_tis, tis_low, tis_high):
        bounded = torch.where(A < 0, r.clamp(max=dual or 1e9), r)
        kept = (r.detach() >= 1 / beta) & (r.detach() <= beta) if beta else A == A
        tis = torch.exp(i["logprobs"] - i["reference_logprobs"]).clamp(tis_low, tis_high)
        pg = torch.maximum(-bounded * A, -bounded.clamp(1 - low, 1 + high) * A)
        return torch.where(kept & (A != 0), pg * (tis if use_tis else 1), 0.0)

    def grpo(ratio):
        def of(low, high, beta, kl_type):
            d = lp - i["reference_logprobs"]
            kl = (d, d.square() / 2, torch.exp(-d) - 1 + d)[int(kl_type)]
            pg = torch.maximum(-ratio * A, -ratio.clamp(1 - low, 1 + high) * A)
            return torch.where(A != 0, pg + beta * kl, 0.0)

        return of

    loss = {
        "causallm_loss": lambda: -i["weights"] * lp,
        "policy_loss": policy,
        "ppo_loss": policy,
        "drgrpo": grpo(r),
        "drgrpo_sequence": grpo(s),
        "cross_entropy": lambda: -i["weights"] * lp,
        "importance_sampling": lambda: -r * A,
        "ppo": lambda low, high: -torch.minimum(r * A, r.clamp(low, high) * A),
        "cispo": lambda low, high: -r.clamp(low, high).detach() * lp * A,
        "dro": lambda beta: -(lp * A - 0.5 * beta * (lp - i["logprobs"]) ** 2) * (A != 0),
        "stable_reinforce": lambda low, high, cap, kl: (
            ((r >= low) & (r <= high) & (A != 0))
            * (-r.clamp(max=cap).detach() * A * lp + kl * (r - 1 - torch.log(r)))
        ),
        "gspo": lambda low, high: -torch.minimum(s * A, s.clamp(low, high) * A),
    }[name](*config)
    loss.sum().backward()
    got_loss, slope = run(name, LOGPROBS, chosen)
    np.testing.assert_allclose(got_loss, loss.detach().numpy(), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(slope, lp.grad.numpy(), rtol=2e-5, atol=1e-6)
