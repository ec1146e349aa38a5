"""Run by test_sharding in a process with 8 devices: `compare_meshes.py VARIANT fsdp=8 data=2,fsdp=4 ...`.

In a mesh that ends with `,turns`, mixtures with experts on several devices compute few rows at once."""

import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from adapters import random_adapter
from tinsmith.model import decoder, experts, load, lora, sharding
from tinsmith.model.config import DeltaNet
from tinsmith.model.folder import read_config
from tiny_models import write_model

variant, *meshes = sys.argv[1:]
heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
if variant == "deepseek_v3":
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
folder = write_model(tempfile.mkdtemp(), variant, hidden_size=64, **heads)
config = read_config(folder)
graph, _ = decoder.build(config, jnp.float32)
rng = np.random.default_rng(0)
B, T = 8, 96
tokens = rng.integers(0, config.vocab_size, (B, T)).astype(np.int32)
start = np.broadcast_to(np.where(np.arange(T) < 40, 0, 40), (B, T)).astype(np.int32)
position = np.arange(T, dtype=np.int32) - start
cotangent = rng.standard_normal((B, T, config.hidden_size)).astype(np.float32)
row_adapter = (np.arange(B) % 2).astype(np.int32)
adapters = tuple(random_adapter(config, seed, train_unembed=False) for seed in range(2))


# Delta nets norm each head's output, also one in which nearly everything cancels: half of the last digit of
# the embedding moves hidden states by 3e-5.
tolerance = 5e-5 if any(isinstance(mixer, DeltaNet) for mixer in config.mixers) else 1e-5


@jax.jit
def outputs_and_gradients(base, adapters, batch):
    def hidden(base, adapters):
        stack = lora.stack_adapters(adapters, jnp.asarray([4.0, 0.5]))
        return decoder.trunk(
            graph, base, batch["tokens"], batch["position"], batch["start"], stack, batch["rows"], "full"
        )

    out, pull = jax.vjp(hidden, base, adapters)
    return out, *pull(batch["cotangent"])


def log_probs(hidden):
    """The log-probs of each row's next tokens."""
    logits = hidden[:, :-1] @ head
    return np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[:, 1:, None], -1)


def run(mesh):
    batch = {
        "tokens": tokens, "position": position, "start": start, "rows": row_adapter, "cotangent": cotangent
    }  # fmt: skip
    with jax.set_mesh(mesh):
        base = load.load_base(folder, config, jnp.float32, mesh)
        batch = {k: jax.device_put(x, sharding.rows_sharding(mesh, x.shape)) for k, x in batch.items()}
        on_device = jax.device_put(adapters, sharding.replicated(mesh))
        outputs_and_gradients.clear_cache()
        result = outputs_and_gradients(base, on_device, batch)
    return base, jax.tree.map(np.asarray, result)


unsharded, (expected, *expected_grads) = run(sharding.make_mesh())
head = np.asarray(decoder.unembed(unsharded)).T
for text in meshes:
    sizes = text.removesuffix(",turns")
    experts.AT_ONCE, experts.SPARE_ROWS = (0, 0.5) if sizes != text else (1 << 14, 1.25)
    axes = {name: int(size) for name, size in (part.split("=") for part in sizes.split(","))}
    base, (out, *grads) = run(sharding.make_mesh(axes))
    stack = config.all_stacks[0]
    up = stack.of(base["layers"])[stack.layer.sites[-2].name]["weight"]
    held, whole = up.addressable_shards[0].data.size, up.size
    shards = axes.get("fsdp", 1) * axes.get("expert", 1) * axes.get("tensor", 1)
    assert held == whole // shards, "the weights are not cut"
    np.testing.assert_allclose(log_probs(out), log_probs(expected), atol=1e-5)
    np.testing.assert_allclose(out, expected, atol=tolerance)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()))
    print(text, "equal")
