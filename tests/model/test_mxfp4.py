"""gpt-oss's files in MXFP4 are read as transformers converts them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from adapters import parameters_with, random_adapter
from safetensors.numpy import load_file, save_file
from tinsmith.ckpt.merged import in_memory, save_merged
from tinsmith.model import load, weight_files
from tinsmith.model.folder import digest, read_config
from tiny_models import write_model

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference


@pytest.fixture
def folder(tmp_path):
    """A model whose experts are random nibbles and exponents near 1."""
    folder = write_model(tmp_path / "packed", "gpt_oss", tokenizer=False, intermediate_size=64)
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, into, out = tensors.pop(name).shape
        shape = (experts, out, into // 32, 16)
        tensors[f"{name}_blocks"] = rng.integers(0, 256, shape, dtype=np.uint8)
        tensors[f"{name}_scales"] = rng.integers(122, 126, shape[:-1], dtype=np.uint8)
    save_file(tensors, folder / "model.safetensors")
    file = folder / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}})
    )
    return folder


def converted(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    parts = (torch.tensor(tensors[name + suffix]) for suffix in ("_blocks", "_scales"))
    return convert_moe_packed_tensors(*parts).float().numpy()


def test_the_values_are_those_of_transformers(folder):
    config = read_config(folder)
    weight_files.check(folder, config)
    assert not weight_files.unread(folder, config)
    base, tensors = load.load_base(folder, config, jnp.float32), load_file(folder / "model.safetensors")
    trees = {stack.key: stack.of(base["layers"]) for stack in config.all_stacks}
    for layer, (stack, at) in enumerate(config.places):
        experts = f"model.layers.{layer}.mlp.experts."
        both, found = converted(tensors, experts + "gate_up_proj"), trees[stack.key]
        np.testing.assert_array_equal(found["expert_gate"]["weight"][at], both[..., 0::2])
        np.testing.assert_array_equal(found["expert_up"]["weight"][at], both[..., 1::2])
        down = converted(tensors, experts + "down_proj")
        np.testing.assert_array_equal(found["expert_down"]["weight"][at], down)


def test_an_adapter_is_merged_into_the_unpacked_model(folder, tmp_path):
    """Names and layout are transformers'; the files are no longer packed."""
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    base, adapter = load.load_base(folder, config, jnp.float32), random_adapter(config, 3, size=0.3)
    out = tmp_path / "plain", tmp_path / "merged"
    for each, given in zip(out, (None, adapter), strict=True):
        save_merged(each, in_memory(base), config, base_folder=folder, adapter=given, scale=2.0)
        assert "quantization_config" not in json.loads((each / "config.json").read_text())
    plain, merged = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in out)
    tokens = torch.tensor(np.random.default_rng(0).integers(0, 320, (2, 24)))
    with torch.no_grad():
        changed = parameters_with(plain, adapter, config, 2.0)
        beside = torch.func.functional_call(plain, changed, (tokens,)).logits
        found = torch.log_softmax(merged(tokens).logits, -1)
        np.testing.assert_allclose(found, torch.log_softmax(beside, -1), atol=1e-4)
        assert (plain(tokens).logits - beside).abs().max() > 0.1


def test_a_changed_exponent_is_another_model(folder):
    config = read_config(folder)
    before = digest(folder, config)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj_scales"][0, 0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    assert digest(folder, config) != before
