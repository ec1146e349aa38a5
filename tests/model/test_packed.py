"""DeepSeek's files in float8 and Kimi's in 4-bit integers mean what their formats say."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from adapters import parameters_with, random_adapter
from safetensors.numpy import load_file, save_file
from tinsmith.ckpt.fp8 import Fp8, quantize
from tinsmith.ckpt.merged import in_memory, save_merged
from tinsmith.model import load, weight_files
from tinsmith.model.config import UnsupportedModelError
from tinsmith.model.families import tensor_shapes
from tinsmith.model.folder import digest, read_config
from tiny_models import write_model

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference

# Some matrices have more than one block of 128, and none a whole number of them.
SIZES = {"hidden_size": 136, "moe_intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 64}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 4}
QUANTIZED = {
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "int4": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": INT4, "input_activations": None, "targets": ["Linear"]}},
    },
}


def with_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def fp8(tmp_path):
    """The layers' matrices in float8, as in DeepSeek-V3's files: routers, norms and embeddings are not."""
    folder = write_model(tmp_path / "fp8", "deepseek_v3", tokenizer=False, **SIZES)
    tensors = load_file(folder / "model.safetensors")
    for name in [each for each in tensors if each.endswith("_proj.weight") or "_with_mqa" in each]:
        # scales that are no powers of two, and differ from block to block
        tensors[name], tensors[f"{name}_scale_inv"] = quantize(tensors[name], (128, 128))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with_config(folder, quantization_config=QUANTIZED["fp8"])
    return folder


@pytest.fixture
def int4(tmp_path):
    """The routed experts in random 4-bit integers, as in Kimi-K2's files, and the matrices that they are."""
    folder = write_model(tmp_path / "int4", "deepseek_v3", tokenizer=False, **SIZES)
    tensors, rng, meant = load_file(folder / "model.safetensors"), np.random.default_rng(0), {}
    for name in [each for each in tensors if ".experts." in each]:
        out, into = tensors.pop(name).shape
        values = rng.integers(-8, 8, (out, into))
        scale = rng.uniform(0.01, 0.05, (out, into // 4)).astype(ml_dtypes.bfloat16)
        words = [
            sum((int(value) + 8) << 4 * at for at, value in enumerate(row)) for row in values.reshape(-1, 8)
        ]
        tensors[f"{name}_packed"] = np.array(words, np.uint32).view(np.int32).reshape(out, into // 8)
        tensors[f"{name}_scale"] = scale
        tensors[f"{name}_shape"] = np.array([out, into], np.int64)
        meant[name] = values * np.repeat(scale.astype(np.float32), 4, axis=1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with_config(folder, quantization_config=QUANTIZED["int4"])
    return folder, meant


def change(folder, name, changed):
    """Change a tensor of a folder; torch reads float8."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[name] = changed(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def copy(folder, name, into):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {into: tensors[name].clone()}, folder / "model.safetensors", {"format": "pt"})


def merged(folder, config, base, into):
    """The tensors that an export writes, by their Hugging Face names."""
    save_merged(into, in_memory(base), config, base_folder=folder)
    return load_file(into / "model.safetensors")


def test_float8_is_what_transformers_makes_of_it(fp8, tmp_path):
    """Compared with transformers' `_dequantize_fp8_weight`: from_pretrained derives other blocks where the
    last one is not whole."""
    from safetensors.torch import load_file as load_torch
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    config = read_config(fp8)
    weight_files.check(fp8, config)
    assert not weight_files.unread(fp8, config)
    found = merged(fp8, config, load.load_base(fp8, config, jnp.float32), tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert found.keys() == tensor_shapes(config).keys()
    stored = load_torch(fp8 / "model.safetensors")
    for name, weight in found.items():
        expected, scale = stored[name], stored.get(f"{name}_scale_inv")
        if scale is not None:
            expected = _dequantize_fp8_weight(expected, scale, [128, 128], torch.float32)
        np.testing.assert_allclose(weight, expected.float().numpy(), rtol=1e-6, err_msg=name)


def test_integers_of_four_bits_are_what_their_format_says(int4, tmp_path):
    """Offset by 8, low bits first, a scale for each group of inputs."""
    folder, meant = int4
    config = read_config(folder)
    weight_files.check(folder, config)
    assert not weight_files.unread(folder, config)
    found = merged(folder, config, load.load_base(folder, config, jnp.float32), tmp_path / "out")
    for name, matrix in meant.items():
        np.testing.assert_allclose(found[name], matrix, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_an_adapter_is_merged_in_float32_and_written_in_the_server_s_dtype_or_in_float8(
    request, tmp_path, kind
):
    """transformers computes what it computes with the adapter beside the unpacked model."""
    from safetensors.torch import load_file as load_torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    folder = request.getfixturevalue(kind)
    folder = folder[0] if kind == "int4" else folder
    config = read_config(folder)
    adapter = random_adapter(config, 3, size=0.3)

    def write(name, dtype=jnp.float32, **options):
        base = load.load_base(folder, config, dtype)
        save_merged(tmp_path / name, in_memory(base), config, base_folder=folder, **options)
        return tmp_path / name

    def loaded(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    with_adapter = {"adapter": adapter, "scale": 2.0}
    plain, merged = loaded(write("plain")), write("merged", **with_adapter)
    tokens = torch.tensor(np.random.default_rng(0).integers(0, 64, (2, 24)))
    with torch.no_grad():
        changed = parameters_with(plain, adapter, config, 2.0)
        beside = torch.func.functional_call(plain, changed, (tokens,)).logits
        found = torch.log_softmax(loaded(merged)(tokens).logits, -1)
        np.testing.assert_allclose(found, torch.log_softmax(beside, -1), atol=1e-4)
        assert (plain(tokens).logits - beside).abs().max() > 0.1

    exact = load_torch(merged / "model.safetensors")
    rounded = load_torch(write("rounded", jnp.bfloat16, **with_adapter) / "model.safetensors")
    in_fp8 = write("in_fp8", fp8=Fp8(), **with_adapter)
    packed = load_torch(in_fp8 / "model.safetensors")
    assert rounded.keys() == exact.keys() < packed.keys()
    assert read_config(in_fp8) == config
    weight_files.check(in_fp8, config)
    for name, weight in exact.items():
        assert rounded[name].dtype == (torch.float32 if "correction" in name else torch.bfloat16)
        torch.testing.assert_close(rounded[name].float(), weight, rtol=2**-7, atol=1e-2)
        if (scale := packed.get(f"{name}_scale_inv")) is not None:
            unpacked = _dequantize_fp8_weight(packed[name], scale, [128, 128], torch.float32)
            largest = float(weight.abs().max())
            torch.testing.assert_close(unpacked, weight, rtol=2**-4, atol=largest / 448)


def test_layers_that_are_not_computed_are_exported_unpacked(fp8, tmp_path):
    """They are those after the last one, for predicting several tokens at once."""
    at, of_layer = "model.layers.2.", "model.layers.1.self_attn.o_proj.weight"
    for suffix in ("", "_scale_inv"):
        copy(fp8, of_layer + suffix, at + "eh_proj.weight" + suffix)
    copy(fp8, "model.norm.weight", at + "enorm.weight")
    config = read_config(fp8)
    found = merged(fp8, config, load.load_base(fp8, config, jnp.float32), tmp_path / "out")
    np.testing.assert_array_equal(found[at + "eh_proj.weight"], found[of_layer])
    np.testing.assert_array_equal(found[at + "enorm.weight"], found["model.norm.weight"])
    assert len(found) == len(tensor_shapes(config)) + 2


def test_parts_of_a_matrix_are_those_of_the_whole(fp8, int4):
    for folder in (fp8, int4[0]):
        config = read_config(folder)
        tensors = weight_files.MappedTensors(folder)
        parameter = tensors.parameters(config)["layers.stack1_0.expert_down.weight"]
        (view,) = tensors.views(parameter._replace(experts=1, layers=range(1, 2)))
        whole = view[:, :, :]
        assert whole.shape == (1, 40, 136)
        np.testing.assert_array_equal(view[:, 3:17, 100:130], whole[:, 3:17, 100:130])


def test_a_changed_scale_is_another_model(fp8, int4):
    for folder, suffix in ((fp8, "_scale_inv"), (int4[0], "_scale")):
        config = read_config(folder)
        before = digest(folder, config)
        change(folder, f"model.layers.1.mlp.experts.0.up_proj.weight{suffix}", lambda scale: scale * 2)
        assert digest(folder, config) != before


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fp8", {"weight_block_size": [64, 64]}, r"weight_block_size is \[64, 64\]"),
        ("fp8", {"weight_block_size": None}, "weight_block_size is None"),
        ("int4", {"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'"),
        ("int4", {"config_groups": {"g": {"weights": INT4 | {"num_bits": 8}}}}, "g.weights.num_bits is 8"),
        ("int4", {"config_groups": {"g": {"weights": INT4 | {"symmetric": False}}}}, "symmetric is False"),
        (
            "int4",
            {"config_groups": {"g": {"weights": INT4, "input_activations": {}}}},
            "input_activations is",
        ),
        ("int4", {"quant_method": "awq"}, "quantization_config: awq"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, kind, change, message):
    write_model(tmp_path, "deepseek_v3", tokenizer=False, quantization_config=QUANTIZED[kind] | change)
    with pytest.raises(UnsupportedModelError, match=message):
        read_config(tmp_path)


def test_scales_that_do_not_fit_are_refused(fp8):
    name = "model.layers.0.self_attn.o_proj.weight"
    change(fp8, f"{name}_scale_inv", lambda scale: torch.ones(3, 1))
    with pytest.raises(weight_files.WeightsError, match=rf"{name}: a float8 tensor of \(136, 48\)"):
        weight_files.check(fp8, read_config(fp8))
