"""The process with which `tinsmith plan` compiles a training step for a device that is not here."""

from __future__ import annotations

import json
import os
import subprocess
from math import prod
from pathlib import Path

import pytest

from .laboratory_process import VENV

CONFIG = {
    "model_type": "qwen3", "head_dim": 64, "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}  # fmt: skip
MATRICES = [(256, 256), (256, 128), (256, 128), (256, 256), (256, 512), (256, 512), (512, 256)]


def test_a_step_is_compiled_from_config_json_alone(tmp_path: Path) -> None:
    """The step's arguments are the base in bfloat16, an adapter and its gradients in float32, and a
    micro-batch."""
    if not (VENV / ".installed").exists():
        pytest.skip("no compilers for accelerators: `make laboratory` installs them, with a python3.12")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    step = {
        "folder": str(tmp_path),
        "device": "h200",
        "work": {"sequence": 512, "rank": 8},
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1},
        "rows": 2,
        "remat": "full",
    }
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    command = [VENV / "bin" / "python", "-m", "tinsmith.engine.plan"]
    ran = subprocess.run(command, input=json.dumps(step), env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    norms = 2 * (2 * 256 + 2 * 64) + 256
    base = 2 * sum(map(prod, MATRICES)) + 2 * 2048 * 256 + norms
    adapter = 8 * (2 * sum(map(sum, MATRICES)) + 2048 + 256)
    arguments = 2 * base + 2 * 4 * adapter
    micro_batch = 2 * 512 * 4 * 20  # at most twenty numbers of each token
    assert arguments < found["arguments"] < arguments + micro_batch
    assert found["temporaries"] > 0
