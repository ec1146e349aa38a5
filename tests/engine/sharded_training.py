"""Run by test_trainer: three steps on an 8-device mesh and on one device, compared to 1e-5."""

import os
import sys
from pathlib import Path

# Eight devices, and programs that are quick to compile rather than to run.
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from engine_training import lora, make_trainer, random_data, run, with_random_b, worst
from tinsmith.engine.messages import AdamParams
from tinsmith.model.sharding import make_mesh


def train(folder: Path, mesh, spec):
    trainer = make_trainer(folder, "qwen2", mesh)
    state = trainer.create(spec)
    if spec is not None:
        state = with_random_b(state)
    for step in range(3):
        output = run(trainer, state, random_data([30, 64, 7, 12, 50, 3], step))
        trainer.optim_step(state, AdamParams(learning_rate=1e-3, eps=1e-4, grad_clip_norm=1.0))
    assert len(trainer.compiled) == 3, trainer.compiled
    return output, state


folder, kind = Path(sys.argv[1]), sys.argv[2]
spec = lora(8) if kind == "lora" else None
want, want_state = train(folder, make_mesh(None), spec)
got, got_state = train(folder, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), spec)
for a, b in zip(got.logprobs, want.logprobs, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
assert worst(got_state.weights, want_state.weights) < 1e-5
