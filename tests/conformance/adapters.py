"""Adapters in tars, as clients send them."""

from __future__ import annotations

import io
import json
import tarfile
from typing import Any

import numpy as np
from safetensors.numpy import save
from tiny_models import VOCAB_SIZE

RANK = 2


def lm_head(hidden_size: int, **config: Any) -> dict[str, bytes]:
    """The files of an adapter on the tiny model's unembedding alone; `config` replaces what it says."""
    tensors = {
        "base_model.model.lm_head.lora_A.weight": np.full((RANK, hidden_size), 0.01, np.float32),
        "base_model.model.lm_head.lora_B.weight": np.full((VOCAB_SIZE, RANK), 0.01, np.float32),
    }
    written = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["lm_head"]} | config
    return {"adapter_config.json": json.dumps(written).encode(), "adapter_model.safetensors": save(tensors)}


def tarred(files: dict[str, bytes], *members: tarfile.TarInfo, **how: Any) -> bytes:
    """`members` come first; they have no content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, **({"mode": "w"} | how)) as tar:
        for member in members:
            tar.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
