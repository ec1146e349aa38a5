"""Gradients of a full-weight bfloat16 step, compared with torch's. Also run as a program, on a mesh of eight
virtual devices: `full_weight_gradients.py FOLDER EXPECTED`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from engine_training import datum, relative, run
from tinsmith.engine.training.trainer import Trainer
from tinsmith.model import decoder
from tinsmith.model.folder import read_config
from tinsmith.model.load import load_base
from tinsmith.model.sharding import make_mesh

LENGTH, COUNT = 256, 8


def token_rows() -> np.ndarray:
    """[COUNT, LENGTH + 1] tokens, of which every second one is the same."""
    tokens = np.random.default_rng(0).integers(3, 300, (COUNT, LENGTH + 1))
    tokens[:, ::2] = 7
    return tokens


def errors(folder: Path, expected: Path, mesh=None) -> dict[str, float]:
    """Return ‖ours - theirs‖ / ‖theirs‖ for each parameter.

    `folder` holds a model in bfloat16; `expected` has its gradients, in float32, in the place of its weights.
    """
    config = read_config(folder)
    graph, _ = decoder.build(config, jnp.bfloat16)
    trainer = Trainer(
        graph, load_base(folder, config, jnp.bfloat16, mesh), config, mesh, micro_batch_tokens=LENGTH * COUNT
    )
    state = trainer.create(None)
    data = [
        datum(row[:-1], target_tokens=row[1:], weights=np.ones(LENGTH, np.float32)) for row in token_rows()
    ]
    run(trainer, state, data)
    found = jax.tree_util.tree_leaves_with_path(state.gradients)
    theirs = jax.tree.leaves(load_base(expected, read_config(expected), jnp.float32))
    return {
        jax.tree_util.keystr(path): relative(ours, want)
        for (path, ours), want in zip(found, theirs, strict=True)
    }


if __name__ == "__main__":
    on_mesh = errors(Path(sys.argv[1]), Path(sys.argv[2]), make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    assert max(on_mesh.values()) < 0.01, on_mesh
