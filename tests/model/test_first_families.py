"""The first three families compute what a decoder written out in one function computes, bit for bit.

The function below knows nothing of descriptions, stacks, scans and sites: it is Llama, Qwen2 and Qwen3 as
they were before other families came, in the same operations of JAX and with the same kernels (attention,
rotation, the products of adapters). Whatever is generalised for other families, these keep their operations
and their order.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import random_adapter
from tinsmith.model import decoder, families, lora
from tinsmith.model.kernels.attention import attention
from tinsmith.model.kernels.product import product
from tinsmith.model.kernels.rotation import rotated
from tiny_models import hf_config, random_weights

SCALE = 1.5


def frequencies(hf):
    """theta^(-2i/H), with Llama 3's scaling if config.json has it."""
    H = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    found = hf["rope_theta"] ** (-np.arange(H // 2, dtype=np.float64) / (H // 2))
    if (scaling := hf.get("rope_scaling")) is None:
        return found.astype(np.float32)
    cycles = scaling["original_max_position_embeddings"] / (2 * np.pi / found)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((cycles - low) / (high - low), 0, 1)
    return ((1 - kept) * found / scaling["factor"] + kept * found).astype(np.float32)


def hidden_states(hf, weights, adapter, tokens, position, start):
    """The hidden states after the final norm; `weights` have the files' names, and matrices are [in, out]."""
    B, T = tokens.shape
    N, K = hf["num_attention_heads"], hf["num_key_value_heads"]
    angle = position[:, :, None, None].astype(jnp.float32) * frequencies(hf)
    cos, sin = jnp.cos(angle), jnp.sin(angle)

    def norm(x, name):
        inverse_rms = jax.lax.rsqrt(jnp.mean(x * x, axis=-1) + hf["rms_norm_eps"])
        return jnp.einsum("...d,...->...d", x, inverse_rms) * weights[f"{name}.weight"]

    def linear(x, at, module, layer):
        name = f"{at}{module}"
        y = x @ weights[f"{name}.weight"]
        if f"{name}.bias" in weights:
            y = y + weights[f"{name}.bias"]
        if adapter is None:
            return y
        pair = adapter["layers"][module.rpartition(".")[2]]
        return y + product(product(x, pair["a"][layer]) * jnp.float32(SCALE), pair["b"][layer])

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(hf["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        y = norm(x, f"{at}input_layernorm")
        q, k, v = (
            linear(y, at, f"self_attn.{name}_proj", layer).reshape(B, T, -1, cos.shape[-1] * 2)
            for name in "qkv"
        )
        if f"{at}self_attn.q_norm.weight" in weights:
            q, k = norm(q, f"{at}self_attn.q_norm"), norm(k, f"{at}self_attn.k_norm")
        assert (q.shape[2], k.shape[2]) == (N, K)
        mixed = attention(rotated(q, cos, sin), rotated(k, cos, sin), v, start, q.shape[-1] ** -0.5)
        x = x + linear(mixed.reshape(B, T, -1), at, "self_attn.o_proj", layer)
        y = norm(x, f"{at}post_attention_layernorm")
        gate, up = (linear(y, at, f"mlp.{name}_proj", layer) for name in ("gate", "up"))
        x = x + linear(jax.nn.silu(gate) * up, at, "mlp.down_proj", layer)
    return norm(x, "model.norm")


@pytest.mark.parametrize(
    ("variant", "with_adapter"),
    [
        ("llama", True),
        ("qwen3", False),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("llama", False),
                ("llama3", False),
                ("llama3", True),
                ("qwen2", False),
                ("qwen2", True),
                ("qwen3", True),
            )
        ),
    ],
)
def test_hidden_states_and_gradients_equal_one_written_out_function(tiny, packed_rows, variant, with_adapter):
    """With an adapter, the gradients are the adapter's; without, the base's."""
    hf, model = hf_config(variant), tiny(variant)
    files = random_weights(hf)
    weights = {
        name: jnp.asarray(w.T if w.ndim == 2 and "embed" not in name else w) for name, w in files.items()
    }
    adapter = random_adapter(model.config, 1, train_unembed=False) if with_adapter else None
    rows = tuple(map(jnp.asarray, packed_rows[:3]))
    cotangent = (
        np.random.default_rng(0).standard_normal((*rows[0].shape, hf["hidden_size"])).astype(np.float32)
    )

    def ours(base, adapter):
        stack = None if adapter is None else lora.stack_adapters((adapter,), jnp.asarray([SCALE]))
        return decoder.trunk(model.graph, base, *rows, stack, jnp.zeros(len(cotangent), jnp.int32))

    def written_out(weights, adapter):
        return hidden_states(hf, weights, adapter, *rows)

    def with_gradients(function, weights):
        # operation by operation: how the compiler fuses them is not the point, and differs with the scan
        with jax.disable_jit():
            if adapter is None:
                out, pull = jax.vjp(lambda weights: function(weights, None), weights)
            else:
                out, pull = jax.vjp(lambda adapter: function(weights, adapter), adapter)
            return out, pull(cotangent)[0]

    np.testing.assert_array_equal(jax.jit(ours)(model.base, adapter), jax.jit(written_out)(weights, adapter))
    found, gradients = with_gradients(ours, model.base)
    expected, expected_gradients = with_gradients(written_out, weights)
    np.testing.assert_array_equal(found, expected)
    if with_adapter:
        jax.tree.map(np.testing.assert_array_equal, gradients, expected_gradients)
        return
    for parameter in families.parameters(model.config):
        ours = gradients
        for key in parameter.path.split("."):
            ours = ours[key]
        for name, index in parameter.tensors():
            np.testing.assert_array_equal(ours[index], expected_gradients[name], err_msg=name)
