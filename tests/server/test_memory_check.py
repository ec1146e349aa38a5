"""Models that do not fit into an accelerator's memory are refused from config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from docs.pages import block
from tinsmith.engine.messages import Devices
from tinsmith.model.folder import ModelConfig, stated_config
from tinsmith.server.base_models import require_memory
from tiny_models import hf_config

GB = 10**9


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """Qwen3-8B's, in a folder without weights."""
    folder = tmp_path_factory.mktemp("qwen3-8b")
    sizes = {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(hf_config("qwen3", **sizes)))
    return stated_config(folder)


def refusal(config: ModelConfig, devices: Devices, **settings: object) -> str:
    with pytest.raises(ValueError, match="too large") as caught:
        require_memory({"m": config}, devices, **settings)  # type: ignore[arg-type]
    return str(caught.value)


def test_the_refusal_says_what_is_needed_and_what_would_do(config: ModelConfig) -> None:
    said = refusal(config, Devices("gpu", 1, 16 * GB))
    assert f"tinsmith: {said}\n" == block("plan.md", "tinsmith: too large")
    assert "(16 GB for 8.19 billion parameters as bfloat16, the rest for the smallest programs" in said
    assert "and 16 GB are free; two of them with --mesh fsdp=2 would do" in said
    require_memory({"m": config}, Devices("gpu", 2, 16 * GB), mesh={"fsdp": 2})
    said = refusal(config, Devices("gpu", 1, 16 * GB), dtype="float32")
    assert "four of them with --mesh fsdp=4" in said
    require_memory({"m": config}, Devices("gpu", 4, 16 * GB), mesh={"fsdp": 4}, dtype="float32")


def test_weights_that_fit_alone_are_not_enough(config: ModelConfig) -> None:
    refusal(config, Devices("gpu", 1, 17 * GB))
    require_memory({"m": config}, Devices("gpu", 1, 24 * GB))
    refusal(config, Devices("gpu", 1, 24 * GB), kv_cache_tokens=200_000)
    with pytest.raises(ValueError, match=r"m, n needs 4\d GB .*16.38 billion parameters"):
        require_memory({"m": config, "n": config}, Devices("gpu", 1, 24 * GB))


def test_a_device_that_does_not_tell_its_memory_is_trusted(config: ModelConfig) -> None:
    require_memory({"m": config}, Devices("tpu", 1, None))


def test_on_a_cpu_what_is_free_now_counts(config: ModelConfig, tmp_path: Path) -> None:
    import psutil

    if psutil.virtual_memory().total > 400 * GB:
        pytest.skip("this machine has room for it")
    said = refusal(config, Devices("cpu", 1), mesh={"data": 8})
    assert "on each device" in said
    assert "--dtype bfloat16 halves the weights" in said
