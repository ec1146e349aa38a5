"""Folders of models that see are read as their text half, and exported with their tower."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tinsmith.ckpt.merged import in_memory, save_merged
from tinsmith.model import decoder, load, weight_files
from tinsmith.model.folder import read_config
from tiny_models import hf_config

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference

TOKENS = np.random.default_rng(0).integers(3, 300, 40).astype(np.int32)
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN_TOWER = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 4}
QWEN_TOWER |= {"num_position_embeddings": 16, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
ROPE = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
LEFT_OUT = ("model_type", "architectures", "rope_theta", "rope_scaling", "torch_dtype")


def text(variant, **changes):
    return {key: value for key, value in hf_config(variant).items() if key not in LEFT_OUT} | changes


WHOLES = {
    "gemma3": {
        "text_config": text("gemma3_text"),
        "vision_config": TOWER | {"image_size": 28, "patch_size": 14},
        "tie_word_embeddings": True,
    },
    "kimi_k25": {
        "text_config": text("deepseek_v3", rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        "vision_config": TOWER,
        "tie_word_embeddings": False,
    },
    "qwen3_vl": {
        "text_config": text("qwen3", rope_parameters=ROPE),
        "vision_config": QWEN_TOWER,
        "tie_word_embeddings": False,
    },
    "qwen3_vl_moe": {
        "text_config": text("qwen3_moe", rope_parameters=ROPE),
        "vision_config": QWEN_TOWER,
        "tie_word_embeddings": False,
    },
}


@pytest.fixture
def whole(tmp_path, request):
    """A tiny random model that sees, as transformers saves it, and its model."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **WHOLES[request.param])
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # norms are not all alike, and experts not all zero
            parameter.copy_(parameter + 0.15 * torch.randn(parameter.shape) / (2 if "norm" in name else 1))
    folder = tmp_path / "whole"
    model.save_pretrained(folder)
    if request.param == "kimi_k25":
        # transformers takes the layers of the text half for those of the tower when it names them
        tensors = load_file(folder / "model.safetensors")
        of_text = "language_model.model.blocks.", "language_model.model.layers."
        renamed = {name.replace(*of_text): array for name, array in tensors.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return folder, model


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


@pytest.mark.parametrize("whole", WHOLES, indirect=True)
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
