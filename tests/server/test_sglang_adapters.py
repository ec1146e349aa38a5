"""Adapters for SGLang servers: only those are sent that SGLang computes as they are meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapters import random_adapter
from safetensors.numpy import load_file, save_file
from tinsmith.ckpt.peft import ADAPTER_FILE, save_adapter
from tinsmith.model.folder import read_config
from tinsmith.server.base_models import BaseModel
from tinsmith.server.plugins.sglang.adapters import problem
from tiny_models import write_model


@pytest.mark.parametrize(
    ("variant", "left_out", "expected"),
    [
        ("qwen3", (), None),
        ("phi3", (), None),
        ("qwen3", ("gate_proj", "up_proj"), None),
        ("qwen3", ("v_proj",), "['k_proj', 'q_proj'] of model.layers.1.self_attn, but not ['v_proj']"),
        ("qwen3", ("gate_proj",), "['up_proj'] of model.layers.1.mlp, but not ['gate_proj']"),
    ],
)
def test_matrices_that_sglang_merges_have_adapters_together(
    tmp_path: Path, variant: str, left_out: tuple[str, ...], expected: str | None
) -> None:
    model = write_model(tmp_path / "model", variant, tokenizer=False)
    config, folder = read_config(model), tmp_path / "adapter"
    save_adapter(folder, random_adapter(config), config, rank=8, alpha=16, base_model="tiny")
    tensors = load_file(folder / ADAPTER_FILE)
    for name in list(tensors):
        if ".layers.1." in name and name.split(".")[-3] in left_out:
            del tensors[name]
    save_file(tensors, folder / ADAPTER_FILE)
    base = BaseModel("tiny", model, None, config.max_sequence_length, config.vocab_size)
    found = problem(folder, base, max_rank=8)
    assert found == (expected and f"the adapter has {expected}")
