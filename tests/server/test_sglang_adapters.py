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
    found = problem(folder, served(model), max_rank=8)
    assert found == (expected and f"the adapter has {expected}")


def served(model: Path) -> BaseModel:
    config = read_config(model)
    return BaseModel("tiny", model, None, config.max_sequence_length, config.vocab_size)


@pytest.mark.parametrize(
    ("variant", "what"),
    [
        ("qwen3_moe", "adapters of experts (model.layers.0.mlp.experts.w1)"),
        ("deepseek_v3", "adapters of experts (model.layers.1.mlp.experts.w1)"),
        ("qwen3_5", "adapters of the text half of a model that sees (model.layers.0.linear_attn.in_proj_k)"),
        ("nemotron_h", "adapters of nemotron_h models (model.layers.0.mixer.gate_proj)"),
    ],
)
def test_the_reason_why_an_adapter_is_not_sent_names_the_alternative(
    tmp_path: Path, variant: str, what: str
) -> None:
    model, folder = write_model(tmp_path / "model", variant, tokenizer=False), tmp_path / "adapter"
    adapter = random_adapter(read_config(model), train_unembed=False)
    save_adapter(folder, adapter, read_config(model), rank=8, alpha=16, base_model="tiny")
    found = problem(folder, served(model), max_rank=8)
    assert found is not None
    assert found.startswith(f"{what} are not sent to SGLang servers")
    assert "--sglang-merge" in found


def test_an_adapter_of_a_mixture_s_attention_is_sent(tmp_path: Path) -> None:
    model, folder = write_model(tmp_path / "model", "qwen3_moe", tokenizer=False), tmp_path / "adapter"
    adapter = random_adapter(read_config(model), train_mlp=False)
    save_adapter(folder, adapter, read_config(model), rank=8, alpha=16, base_model="tiny")
    assert problem(folder, served(model), max_rank=8) is None
