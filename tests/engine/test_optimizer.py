"""AdamW against optax and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tinsmith.engine.optimizers import optimizer

RNG = np.random.default_rng(0)
STEPS = 6


def tree(seed):
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(size=(4, 3)).astype(np.float32), "b": [rng.normal(size=7).astype(np.float32)]}


def hyper(lr, clip=0.0, scale=1.0, decay=0.1, eps=1e-8):
    values = (lr, 0.9, 0.95, eps, decay, clip, scale)
    return optimizer.AdamHyperparameters(*map(jnp.float32, values))


def ours(clip, scale=1.0):
    weights, step = jax.device_put(tree(0)), jax.jit(optimizer.step)
    state = optax.scale_by_adam().init(weights)
    norms = []
    for i in range(STEPS):
        weights, state, zeros, norm = step(weights, state, tree(i + 1), hyper(1e-2 / (i + 1), clip, scale))
        norms.append(norm)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(zeros))
    assert step._cache_size() == 1  # a new learning rate compiles nothing
    return weights, norms


@pytest.mark.parametrize("clip", [0.0, 1.5])
def test_equals_optax_adamw(clip):
    weights, state = tree(0), None
    for i in range(STEPS):
        adamw = optax.adamw(1e-2 / (i + 1), 0.9, 0.95, 1e-8, weight_decay=0.1)
        chain = optax.chain(optax.clip_by_global_norm(clip or 1e9), adamw)
        state = chain.init(weights) if state is None else state
        updates, state = chain.update(tree(i + 1), state, weights)
        weights = optax.apply_updates(weights, updates)
    got, norms = ours(clip)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, weights)
    np.testing.assert_allclose(norms[0].gradient, optax.tree.norm(tree(1)), rtol=1e-6)


@pytest.mark.reference
@pytest.mark.parametrize("clip", [0.0, 1.5])
def test_equals_torch_adamw(clip):
    torch = pytest.importorskip("torch")
    parameters = [torch.tensor(leaf, requires_grad=True) for leaf in jax.tree.leaves(tree(0))]
    adam = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for i in range(STEPS):
        for parameter, gradient in zip(parameters, jax.tree.leaves(tree(i + 1)), strict=True):
            parameter.grad = torch.tensor(gradient)
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        adam.param_groups[0]["lr"] = 1e-2 / (i + 1)
        adam.step()
    got, _ = ours(clip)
    for mine, theirs in zip(jax.tree.leaves(got), parameters, strict=True):
        np.testing.assert_allclose(mine, theirs.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_the_gradient_scale_comes_before_the_clip():
    scaled, norms = ours(1.5, scale=0.25)
    assert float(norms[0].gradient) == pytest.approx(float(optax.tree.norm(tree(1))) / 4, rel=1e-5)
    assert not np.allclose(scaled["a"], ours(1.5)[0]["a"])


@pytest.mark.parametrize("bad", ["gradient", "learning rate"])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    weights, gradients = tree(0), tree(1)
    state = optax.scale_by_adam().init(weights)
    if bad == "gradient":
        gradients["a"][0, 0] = np.nan
    values = hyper(np.inf if bad == "learning rate" else 1e-2)
    new, new_state, _, norms = optimizer.step(weights, state, gradients, values)
    jax.tree.map(np.testing.assert_array_equal, new, weights)
    jax.tree.map(np.testing.assert_array_equal, new_state, state)
    assert not (np.isfinite(norms.gradient) and np.isfinite(norms.update))


def test_without_an_eps_what_has_no_gradient_only_decays():
    """0 / 0 is 0 here: the limit for an eps towards 0."""
    weights, gradients = tree(0), tree(1)
    gradients["a"][:2] = 0.0
    state = optax.scale_by_adam().init(weights)
    new, _, _, norms = optimizer.step(weights, state, gradients, hyper(1e-2, eps=0.0))
    direction = np.sign(gradients["a"])
    want = weights["a"] - 1e-2 * (direction + 0.1 * weights["a"])
    np.testing.assert_allclose(new["a"], want, rtol=1e-5, atol=1e-6)
    assert np.isfinite(norms.update)
