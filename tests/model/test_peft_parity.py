"""LoRA's log-probs and gradients equal PEFT's on torch with the same A and B."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import by_layer
from tinsmith.model import decoder, lora
from tinsmith.model.families import module_name
from tiny_models import VARIANTS

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.reference

RANK, ALPHA = 4, 32


def random_adapter(config):
    adapter = lora.init_lora(config, 1, RANK)
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        if path[-1].key == "b":
            leaf[..., :RANK, :] = 0.1 * rng.standard_normal(leaf[..., :RANK, :].shape)
        return leaf

    return jax.tree_util.tree_map_with_path(fill, adapter)


def peft_model(tiny, adapter):
    """PEFT's model with our A and B copied in, and its leaf parameters by our names."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    targets = [*{site.name for _, site, _, _ in by_layer(adapter, tiny.config)}, "lm_head"]
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
        ),
    )
    modules, parameters = dict(model.named_modules()), {}
    for layer, site, a, b in by_layer(adapter, tiny.config):
        name = module_name(tiny.config, f"layers.{site.name}.weight", layer)
        parameters[site.name, layer] = (modules[f"base_model.model.{name}"], a, b)
    unembed = adapter["unembed"]
    parameters["unembed", 0] = (modules["base_model.model.lm_head"], unembed["a"], unembed["b"])
    with torch.no_grad():
        for module, a, b in parameters.values():
            module.lora_A["default"].weight.copy_(torch.tensor(a[:, :RANK].T))
            module.lora_B["default"].weight.copy_(torch.tensor(b[:RANK].T))
    return model, {key: module for key, (module, _, _) in parameters.items()}


@pytest.mark.parametrize(
    "variant",
    [
        each
        for each in VARIANTS
        if each not in ("qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_5", "qwen3_5_moe", "nemotron_h")
    ],
)  # test_experts
def test_log_probs_and_gradients_equal_peft_s(tiny, packed_rows, variant):
    model = tiny(variant)
    adapter = random_adapter(model.config)
    rng = np.random.default_rng(5)
    targets = rng.integers(0, model.config.vocab_size, packed_rows.tokens.shape)
    weights = np.zeros(packed_rows.tokens.shape, np.float32)
    for row, at in packed_rows.segments:
        weights[row, at] = rng.uniform(-0.5, 1.5, at.stop - at.start)

    def loss(adapter):
        stack = lora.stack_adapters((adapter,), jnp.asarray([ALPHA / RANK]))
        x = decoder.trunk(model.graph, model.base, *map(jnp.asarray, packed_rows[:3]), stack)
        logits = x @ decoder.unembed(model.base).T + lora.delta(x, stack["unembed"], stack["scale"], None)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return -(weights * log_probs).sum(), log_probs

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter)

    reference, modules = peft_model(model, adapter)
    total = 0.0
    for row, at in packed_rows.segments:
        logits = reference(torch.tensor(packed_rows.tokens[row, at][None]).long()).logits[0]
        target = torch.tensor(targets[row, at])
        log_probs = torch.log_softmax(logits, -1).gather(-1, target[:, None])[:, 0]
        np.testing.assert_allclose(ours[row, at], log_probs.detach().numpy(), atol=1e-4)
        total = total - (torch.tensor(weights[row, at]) * log_probs).sum()
    total.backward()

    gradients = {(site.name, layer): (a, b) for layer, site, a, b in by_layer(grads, model.config)}
    gradients["unembed", 0] = grads["unembed"]["a"], grads["unembed"]["b"]
    for (name, layer), module in modules.items():
        a, b = gradients[name, layer]
        for ours_g, theirs in (
            (a[:, :RANK].T, module.lora_A["default"].weight.grad),
            (b[:RANK].T, module.lora_B["default"].weight.grad),
        ):
            error = np.linalg.norm(ours_g - theirs.numpy()) / np.linalg.norm(theirs.numpy())
            assert error < 1e-3, (name, layer, error)
