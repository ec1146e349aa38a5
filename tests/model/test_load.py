"""Weights come from the files into the device arrays as they are, or the error names the tensor."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tinsmith.model import load, weight_files
from tinsmith.model.folder import read_config
from tiny_models import hf_config, random_weights, write_model


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_every_dtype_and_sharded_files(tmp_path, shards, stored, wanted):
    folder = write_model(tmp_path, "qwen2_untied", shards=shards, dtype=stored, tokenizer=False)
    base = load.load_base(folder, read_config(folder), wanted)
    kind = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[stored]
    weights = {name: w.astype(kind) for name, w in random_weights(hf_config("qwen2_untied")).items()}

    def same(ours, theirs):
        assert ours.dtype == wanted
        np.testing.assert_array_equal(np.asarray(ours), theirs.astype(ours.dtype))

    same(base["embed_tokens"]["weight"], weights["model.embed_tokens.weight"])
    same(base["lm_head"]["weight"], weights["lm_head.weight"].T)
    for layer in range(3):
        at = f"model.layers.{layer}."
        same(base["layers"]["k_proj"]["weight"][layer], weights[f"{at}self_attn.k_proj.weight"].T)
        same(base["layers"]["k_proj"]["bias"][layer], weights[f"{at}self_attn.k_proj.bias"])
        same(base["layers"]["down_proj"]["weight"][layer], weights[f"{at}mlp.down_proj.weight"].T)
        same(base["layers"]["input_layernorm"]["weight"][layer], weights[f"{at}input_layernorm.weight"])


def load_folder(folder):
    return load.load_base(folder, read_config(folder), jnp.float32)


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_a_missing_tensor_is_named(tmp_path):
    folder = write_model(tmp_path, "llama")
    rewrite(folder, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(weight_files.WeightsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_folder(folder)


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path):
    folder = write_model(tmp_path, "llama")
    rewrite(folder, lambda w: w.update({"model.norm.weight": np.ones(33, np.float32)}))
    with pytest.raises(weight_files.WeightsError, match=r"model\.norm\.weight.*\(33,\).*\(32,\)"):
        load_folder(folder)


def test_a_file_cut_short_is_refused(tmp_path):
    folder = write_model(tmp_path, "llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(weight_files.WeightsError, match="cut short"):
        load_folder(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = write_model(tmp_path, "llama", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(weight_files.WeightsError, match="model-00002-of-00002"):
        load_folder(folder)


def test_a_folder_without_weights_is_refused(tmp_path):
    folder = write_model(tmp_path, "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(weight_files.WeightsError, match=r"no \.safetensors"):
        load_folder(folder)


def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(tmp_path):
    assert load.find_model(str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        load.find_model(str(tmp_path / "nowhere"))


def test_transformers_5_rope_parameters_read_like_the_old_layout(tmp_path):
    old = hf_config("llama3")
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    read = []
    for name, hf in (("old", old), ("new", new)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(hf))
        read.append(read_config(folder))
    assert read[0] == read[1]
    (rope,) = read[0].ropes
    assert rope.theta == 500_000
    assert rope.scaling.kind == "llama3"
