"""Mixtures of experts: adapters' gradients against torch, several adapters in a batch, what is trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import parameters_with, random_adapter
from engine_sampling import load_tiny
from tinsmith.model import decoder, lora

RANK, SCALE = 4, 8.0


@functools.partial(jax.jit, static_argnums=0)
def log_probs(graph, base, adapters, scale, row_adapter, rows, targets):
    """The targets' log-probs, [B, T], with each row's adapter."""
    stack = lora.stack_adapters(adapters, scale)
    hidden = decoder.trunk(graph, base, *rows, stack, row_adapter)
    z = decoder.logits(decoder.unembed(base), stack, hidden, row_adapter)
    return jnp.take_along_axis(jax.nn.log_softmax(z), targets[..., None], -1)[..., 0]


@pytest.fixture(scope="module")
def targets(packed_rows):
    return np.random.default_rng(5).integers(0, 320, packed_rows.tokens.shape)


DENSE = {"hybrid_override_pattern": "M-*M-"}
WITHOUT_LATENTS = {"hybrid_override_pattern": "ME*EM", "moe_latent_size": None}
MIXED = {"mlp_only_layers": [1], "norm_topk_prob": False}  # two kinds of layers: dense and with experts


@pytest.mark.reference
@pytest.mark.parametrize(
    ("variant", "overrides"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", MIXED),
        ("gpt_oss", {}),
        ("deepseek_v3", {}),
        ("qwen3_5", {}),
        ("qwen3_5_moe", {}),
        ("nemotron_h", {}),
        ("nemotron_h", DENSE),
        ("nemotron_h", WITHOUT_LATENTS),
    ],
)
def test_log_probs_and_gradients_equal_torch_s(tmp_path, packed_rows, targets, variant, overrides):
    """transformers runs the weights with the adapter's products added; torch differentiates through them."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = load_tiny(tmp_path, variant, num_hidden_layers=3, **overrides)
    adapter = random_adapter(model.config, 1, RANK)
    weights = np.zeros(targets.shape, np.float32)
    rng = np.random.default_rng(6)
    for row, at in packed_rows.segments:
        weights[row, at] = rng.uniform(-0.5, 1.5, at.stop - at.start)

    def loss(adapter):
        found = log_probs(
            model.graph, model.base, (adapter,), jnp.full(1, SCALE), None, packed_rows[:3], targets
        )
        return -(weights * found).sum(), found

    (_, ours), gradients = jax.value_and_grad(loss, has_aux=True)(adapter)

    reference = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    leaves = jax.tree.map(lambda leaf: torch.tensor(leaf, requires_grad=True), adapter)
    parameters = parameters_with(reference, leaves, model.config, SCALE)
    total = 0.0
    for row, at in packed_rows.segments:
        ids = torch.tensor(packed_rows.tokens[row, at][None]).long()
        z = torch.func.functional_call(reference, parameters, (ids,)).logits[0]
        theirs = torch.log_softmax(z, -1).gather(-1, torch.tensor(targets[row, at])[:, None])[:, 0]
        np.testing.assert_allclose(ours[row, at], theirs.detach().numpy(), atol=1e-4)
        total = total - (torch.tensor(weights[row, at]) * theirs).sum()
    total.backward()
    for (path, got), leaf in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(leaves), strict=True
    ):
        expected = leaf.grad.numpy()
        if path[-1].key == "a":
            assert not np.asarray(got)[..., RANK:].any(), "padding of the rank"
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert error < 1e-3, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize("variant", ["qwen3_moe", "gpt_oss", "qwen3_5_moe", "nemotron_h"])
def test_rows_of_several_adapters_equal_each_adapter_alone(tiny, packed_rows, targets, variant):
    model = tiny(variant)
    adapters = tuple(random_adapter(model.config, seed, RANK) for seed in range(3))
    scale, rows = jnp.asarray([SCALE, 1.0, 0.5]), packed_rows[:3]
    both = log_probs(model.graph, model.base, adapters, scale, jnp.asarray([2, 0]), rows, targets)
    for row, n in enumerate([2, 0]):
        alone = log_probs(
            model.graph, model.base, adapters[n : n + 1], scale[n : n + 1], jnp.zeros(2, int), rows, targets
        )
        np.testing.assert_allclose(both[row], alone[row], atol=2e-5)


def test_an_adapter_shares_the_factor_at_the_hidden_size_and_leaves_the_router_alone(tiny):
    """The form of the hosted service: gate and up share A, down shares B; each expert has the full rank."""
    L, E, D, F, R = 3, 8, 32, 24, 8
    adapter = lora.init_lora(tiny("qwen3_moe").config, 0, RANK, train_attn=False, train_unembed=False)
    assert jax.tree.map(np.shape, adapter["layers"]) == {
        "expert_gate": {"a": (L, D, R), "b": (L, E, R, F)},
        "expert_up": {"a": (L, D, R), "b": (L, E, R, F)},
        "expert_down": {"a": (L, E, F, R), "b": (L, R, D)},
    }


def force_experts(reference, experts_TMk):
    """Make the routers of a transformers model choose these experts, with their own probabilities."""
    import torch

    routers = [
        module for module in reference.modules() if type(module).__name__.endswith(("TopKRouter", "Router"))
    ]
    assert len(routers) == experts_TMk.shape[1]
    for router, of_layer in zip(routers, torch.tensor(np.moveaxis(experts_TMk, 1, 0)).long(), strict=True):

        def forward(x, router=router, chosen=of_layer):
            x = x.reshape(-1, router.hidden_dim)
            logits = torch.nn.functional.linear(x, router.weight, getattr(router, "bias", None))
            weight = torch.softmax(logits.float(), -1).gather(-1, chosen)
            if getattr(router, "norm_topk_prob", True):
                weight = weight / weight.sum(-1, keepdim=True)
            return logits, weight, chosen

        router.forward = forward


@pytest.mark.reference
@pytest.mark.parametrize(("variant", "overrides"), [("qwen3_moe", MIXED), ("gpt_oss", {})])
def test_given_experts_are_used_with_the_router_s_own_weights(tmp_path, variant, overrides):
    """Log-probs, and gradients by the router and the embedding, equal torch's with forced routers."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = load_tiny(tmp_path, variant, num_hidden_layers=3, **overrides)
    layers, k, E = model.config.routing
    rng = np.random.default_rng(2)
    T = 20
    tokens, targets = rng.integers(0, 320, (2, 1, T))
    given = np.stack([rng.permutation(E)[:k] for _ in range(T * layers)]).reshape(1, T, layers, k)
    rows = jnp.asarray(tokens), jnp.arange(T)[None], jnp.zeros((1, T), int), jnp.ones((1, T), bool)

    @jax.jit
    def found(base, experts):
        hidden, counts = decoder.routed_trunk(model.graph, base, *rows, replayed_BTMk=experts)
        z = decoder.logits(decoder.unembed(base), None, hidden, None)
        return jnp.take_along_axis(jax.nn.log_softmax(z), targets[..., None], -1)[0, :, 0], counts

    def loss(base):
        logprobs, counts = found(base, given.astype(np.int16))
        return logprobs.sum(), (logprobs, counts)

    gradients, (ours, counts) = jax.grad(loss, has_aux=True)(model.base)
    expected_counts = [np.bincount(given[0, :, layer].ravel(), minlength=E) for layer in range(layers)]
    np.testing.assert_array_equal(counts[:, 0], expected_counts)

    reference = AutoModelForCausalLM.from_pretrained(
        model.folder, dtype=torch.float32, experts_implementation="eager"
    )
    force_experts(reference, given[0])
    z = reference(torch.tensor(tokens)).logits[0]
    theirs = torch.log_softmax(z, -1).gather(-1, torch.tensor(targets[0])[:, None])[:, 0]
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-4)
    theirs.sum().backward()
    parameters = dict(reference.named_parameters())
    name = "gate" if variant == "qwen3_moe" else "router"
    layer = next(iter(model.config.mixtures))
    stack, number = model.config.places[layer]
    router = stack.of(gradients["layers"])["router"]["weight"][number].T
    for got, leaf in (
        (router, parameters[f"model.layers.{layer}.mlp.{name}.weight"]),
        (gradients["embed_tokens"]["weight"], parameters["model.embed_tokens.weight"]),
    ):
        expected = leaf.grad.numpy()
        assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 1e-3


@pytest.mark.parametrize("variant", ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_5_moe", "nemotron_h"])
def test_a_router_s_own_choices_given_to_it_change_nothing(tiny, variant):
    """The router's own choices are found by leaving all others out: the tokens that each expert gets stay the
    same."""
    model = tiny(variant)
    layers, k, _ = model.config.routing
    T = 12
    tokens = np.random.default_rng(4).integers(0, 320, (1, T))
    rows = jnp.asarray(tokens), jnp.arange(T)[None], jnp.zeros((1, T), int)

    @jax.jit
    def run(experts, real):
        return decoder.routed_trunk(model.graph, model.base, *rows, real, replayed_BTMk=experts)

    free = np.full((1, T, layers, k), -1, np.int16)
    expected, _ = run(free, np.ones((1, T), bool))
    own = np.zeros((1, T, layers, k), np.int16)
    for token in range(T):  # the counts of one token name its experts
        _, counts = run(free, np.arange(T)[None] == token)
        own[0, token] = [np.flatnonzero(of_layer) for of_layer in np.asarray(counts[:, 0])]
    replayed, _ = run(own, np.ones((1, T), bool))
    np.testing.assert_allclose(replayed, expected, rtol=0, atol=1e-5)
    without, _ = decoder.routed_trunk(model.graph, model.base, *rows, jnp.ones((1, T), bool))
    np.testing.assert_allclose(without, expected, rtol=0, atol=1e-5)
