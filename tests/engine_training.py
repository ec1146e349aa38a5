"""A tiny model, its trainer and the operations that the training tests put together."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tinsmith.engine.messages import Datum, ForwardBackward, LoraSpec, Tensor
from tinsmith.engine.training.trainer import Trainer
from tinsmith.model import decoder
from tinsmith.model.folder import read_config
from tinsmith.model.load import load_base
from tiny_models import VOCAB_SIZE, write_model


def make_trainer(folder: Path, variant: str = "llama", mesh=None, dtype=jnp.float32, **options) -> Trainer:
    """A trainer of a new tiny model; its compilations are listed in `.compiled`."""
    config = read_config(write_model(folder, variant, tokenizer=False))
    graph, _ = decoder.build(config, dtype)
    compiled: list[str] = []
    options = {"max_sequence_length": 64, "chunk_tokens": 64} | options
    trainer = Trainer(
        graph,
        load_base(folder, config, dtype, mesh),
        config,
        mesh,
        on_compile=lambda name, seconds: compiled.append(name),
        **options,
    )
    trainer.compiled = compiled
    return trainer


def tensor(values) -> Tensor:
    array = np.asarray(values)
    return Tensor(str(array.dtype), array.shape, array.tobytes())


def datum(tokens, **inputs) -> Datum:
    return Datum(np.asarray(tokens, "<i4").tobytes(), {name: tensor(value) for name, value in inputs.items()})


def random_data(lengths, seed=0, loss="cross_entropy", vocab=VOCAB_SIZE) -> list[Datum]:
    """Random sequences with all the inputs that `loss` needs."""
    rng = np.random.default_rng(seed)
    data = []
    for length in lengths:
        tokens = rng.integers(0, vocab, length + 1)
        inputs = {"target_tokens": tokens[1:]}
        if loss == "cross_entropy":
            inputs["weights"] = rng.normal(size=length).astype(np.float32)
        else:
            inputs["logprobs"] = (-5.7 + 0.3 * rng.normal(size=length)).astype(np.float32)
            inputs["advantages"] = rng.normal(size=length).astype(np.float32)
        if loss == "gspo":
            inputs["sequence_ratio_mask"] = (rng.random(length) < 0.7).astype(np.float32)
        data.append(datum(tokens[:-1], **inputs))
    return data


def operation(data, loss="cross_entropy", config=None, forward_only=False) -> ForwardBackward:
    return ForwardBackward("request", "model", data, loss, config or {}, forward_only)


def run(trainer, state, data, loss="cross_entropy", config=None, forward_only=False):
    """Forward and backward of one model; raises what went wrong."""
    (result,) = trainer.forward_backward([trainer.job(state, operation(data, loss, config, forward_only))])
    if isinstance(result, Exception):
        raise result
    return result


def lora(rank=4, **options) -> LoraSpec:
    return LoraSpec(**({"rank": rank, "alpha": 32.0, "seed": 1} | options))


def with_random_b(state, seed=0):
    """B random instead of zero (in the true rank), so that A has a gradient from the first step."""
    import jax

    rng = np.random.default_rng(seed)
    rank = state.lora.rank

    def fill(path, leaf):
        if path[-1].key != "b":
            return leaf
        b = np.zeros(leaf.shape, np.float32)
        b[..., :rank, :] = rng.normal(size=(*leaf.shape[:-2], rank, leaf.shape[-1])) * 0.05
        return jax.device_put(b, leaf.sharding)

    state.weights = jax.tree_util.tree_map_with_path(fill, state.weights)
    return state


def relative(got, want) -> float:
    """‖got - want‖ / ‖want‖."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-12))


def worst(got, want) -> float:
    """The largest relative difference of two trees' leaves."""
    import jax

    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(relative(a, b) for a, b in pairs)
