"""Folders of models that see are read as their text half, and exported with their tower."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import random_adapter
from models_that_see import WHOLES, WITH_MAMBA, write_model_that_sees
from safetensors.numpy import load_file, save_file
from tinsmith.ckpt.merged import in_memory, save_merged
from tinsmith.ckpt.peft import save_adapter
from tinsmith.model import decoder, load, weight_files
from tinsmith.model.folder import head_name, read_config

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference

TOKENS = np.random.default_rng(0).integers(3, 300, 40).astype(np.int32)


@pytest.fixture
def whole(tmp_path, request):
    """A tiny random model that sees, in its folder and in memory."""
    folder = tmp_path / "whole"
    return folder, write_model_that_sees(folder, request.param)


def log_probs(model):
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor(TOKENS[None]).long()).logits[0], -1).numpy()


def ours(folder):
    config = read_config(folder)
    weight_files.check(folder, config)
    base = load.load_base(folder, config, jnp.float32)
    graph, _ = decoder.build(config, jnp.float32)
    position = np.arange(len(TOKENS), dtype=np.int32)[None]
    hidden = jax.jit(decoder.trunk, static_argnums=0)(
        graph, base, TOKENS[None], position, np.zeros_like(position)
    )
    return config, base, np.asarray(jax.nn.log_softmax(hidden[0] @ decoder.unembed(base).T))


@pytest.mark.parametrize("whole", [*WHOLES, *WITH_MAMBA], indirect=True)
def test_log_probs_are_those_of_the_whole_model_and_exports_have_its_files(tmp_path, whole):
    folder, model = whole
    config, base, found = ours(folder)
    np.testing.assert_allclose(found, log_probs(model), atol=1e-4)
    assert set(weight_files.copied(folder, config)) == set(weight_files.unread(folder, config))

    save_merged(tmp_path / "out", in_memory(base), config, base_folder=folder)
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "out"))
    assert after.keys() == before.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
    assert config.tie_embeddings or head_name(config) in before


@pytest.mark.parametrize("whole", WHOLES, indirect=True)
def test_an_adapter_is_merged_into_the_whole_model_and_read_by_peft_beside_it(tmp_path, whole):
    """Also one of the unembedding, which then is no longer tied."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    folder, _ = whole
    config, base, without = ours(folder)
    adapter = random_adapter(config, 3, 5, size=0.3)
    out = tmp_path / "out"
    save_merged(out, in_memory(base), config, base_folder=folder, adapter=adapter, scale=2.0)
    names = {"rank": 5, "alpha": 10, "base_model": "tiny", "experts": "target_parameters"}
    save_adapter(tmp_path / "adapter", adapter, config, **names)
    whole_again = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    beside = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    beside = PeftModel.from_pretrained(beside, tmp_path / "adapter").eval()
    _, _, found = ours(out)
    assert np.abs(found - without).max() > 0.1
    np.testing.assert_allclose(found, log_probs(whole_again), atol=1e-4)
    np.testing.assert_allclose(found, log_probs(beside), atol=1e-4)


@pytest.mark.parametrize("whole", ["qwen3_vl_moe"], indirect=True)
def test_the_hub_s_layout_of_experts_is_read_and_kept(tmp_path, whole):
    """[experts, in, out], where transformers writes [experts, out, in]."""
    folder, model = whole
    expected = log_probs(model)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config, base, found = ours(folder)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    save_merged(tmp_path / "out", in_memory(base), config, base_folder=folder)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: array.shape for name, array in after.items()} == {
        name: array.shape for name, array in tensors.items()
    }


def test_a_quantised_text_half_is_exported_without_its_quantization(tmp_path):
    from tiny_models import write_model

    folder = write_model(tmp_path / "text", "deepseek_v3", tokenizer=False)
    file = folder / "config.json"
    inner = json.loads(file.read_text())
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    top = {"model_type": "kimi_k25", "text_config": inner | {"quantization_config": fp8}}
    file.write_text(json.dumps(top | {"tie_word_embeddings": False}))
    config, base, _ = ours(folder)
    save_merged(tmp_path / "out", in_memory(base), config, base_folder=folder)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written["text_config"]
    assert read_config(tmp_path / "out") == config

    awq = {"text_config": inner | {"quantization_config": {"quant_method": "awq"}}}
    file.write_text(json.dumps(top | awq))
    with pytest.raises(ValueError, match="quantization_config: awq"):
        read_config(folder)
