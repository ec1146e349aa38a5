"""Weights leave the server as the cookbook's tools want them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cookbook.programs import Cookbook
from cookbook.workplace import CHAT
from tinsmith.ckpt import peft
from tinsmith.model.folder import read_config

from tests.ckpt.test_peft import ALPHA, RANK, log_probs_of_the_formula, random_adapter
from tests.tiny_models import write_model

pytestmark = pytest.mark.slow


def test_downloads_load_with_equal_log_probs(
    cookbook: Cookbook, chat_model: Path, seen: Callable[[str, str], None]
) -> None:
    program = Path(__file__).with_name("weights_lifecycle.py")
    output = cookbook.execute("weights", program, CHAT, chat_model, cookbook.folder / "weights")
    found = json.loads(output.splitlines()[-1])
    seen(
        "`weights.download`, `build_hf_model`, `build_lora_adapter`",
        "differences of log-probs from the sampler's: "
        + ", ".join(f"{name} {found[name]:.0e}" for name in ("merged", "sharded", "adapter")),
    )
    assert found["learnt"] > 0.1
    assert found["tensors"] > 0
    assert found["exports_differ"] == 0, "the encrypted, temporary export is the plain one"
    for name in ("merged", "sharded", "adapter"):
        assert found[name] < 1e-4, name


@pytest.mark.parametrize(
    ("variant", "strategy"),
    [
        ("qwen3_moe", "full"),
        ("gpt_oss", "full"),
        ("qwen3_5", "full"),
        ("qwen3_5_moe", "full"),
        # The cookbook knows the names of these in files, which are not those of modules in transformers 5.
        ("deepseek_v3", "shard"),
        ("nemotron_h", "shard"),
    ],
)
def test_the_cookbook_merges_an_adapter_of_experts(
    python: Path, tmp_path: Path, variant: str, strategy: str
) -> None:
    """The adapter has the form `shared`; the merged model has its log-probs."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model, adapter, merged = (tmp_path / name for name in ("model", "adapter", "merged"))
    # The cookbook knows the model by the type of the whole one, which sees.
    whole = {"model_type": variant, "architectures": ["Qwen3_5MoeForConditionalGeneration"]}
    config = read_config(write_model(model, variant, **(whole if variant == "qwen3_5_moe" else {})))
    weights = random_adapter(config, train_unembed=False)
    peft.save_adapter(adapter, weights, config, rank=RANK, alpha=ALPHA, base_model="tiny")
    program = (
        "import sys; from tinker_cookbook import weights; weights.build_hf_model(base_model=sys.argv[1], "
        "adapter_path=sys.argv[2], output_path=sys.argv[3], merge_strategy=sys.argv[4], dtype='float32')"
    )
    subprocess.run([python, "-c", program, model, adapter, merged, strategy], check=True, timeout=300)

    def loaded(folder: Path) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    tokens = torch.tensor(np.random.default_rng(0).integers(0, config.vocab_size, (2, 24)))
    with torch.no_grad():
        found = torch.log_softmax(loaded(merged)(tokens).logits, -1)
        expected = log_probs_of_the_formula(loaded(model), weights, config, tokens)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-4)
