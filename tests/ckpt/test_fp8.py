import json

import ml_dtypes
import numpy as np
import pytest
from tinsmith.ckpt.fp8 import Fp8, quantize
from tinsmith.ckpt.merged import in_memory, save_merged
from tinsmith.model.folder import read_config

from tests.ckpt.test_merged import our_base
from tests.tiny_models import hf_config, random_weights, write_model

LARGEST = 448.0


def dequantized(weight, scale, block):
    """Element by element, as the layout is defined."""
    out = np.empty(weight.shape, np.float32)
    rows, columns = block or weight.shape
    for i, j in np.ndindex(*weight.shape):
        out[i, j] = np.float32(weight[i, j]) * (scale[i // rows, j // columns] if block else scale)
    return out


@pytest.mark.parametrize("block", [(8, 8), (16, 4), (5, 7), None], ids=str)
def test_a_weight_is_half_a_step_away_at_most(block):
    weight = np.random.default_rng(0).standard_normal((20, 24)).astype(np.float32)
    weight[:8, :8] *= 1000  # a block of its own size
    weight[16:, :] = 0
    quantized, scale = quantize(weight, block)
    assert quantized.dtype == ml_dtypes.float8_e4m3fn
    assert scale.dtype == np.float32
    rows, columns = block or weight.shape
    assert scale.shape == ((-(-20 // rows), -(-24 // columns)) if block else ())
    found = dequantized(quantized, scale, block)
    spread = np.broadcast_to(scale, (1, 1)) if block is None else scale
    spread = np.kron(spread, np.ones((rows, columns), np.float32))[:20, :24]
    # Half of the distance of neighbours: 2^-4 of itself, or of the smallest normal number.
    step = np.maximum(np.abs(weight), spread * 2.0**-6) * 2.0**-4
    assert (np.abs(found - weight) <= step * 1.0001).all()
    assert np.isfinite(quantized.astype(np.float32)).all()
    assert np.abs(quantized.astype(np.float32)).max() == LARGEST
    np.testing.assert_array_equal(found[16:], 0)


def test_the_folder_says_which_matrices_are_in_it_and_keeps_what_servers_read_as_one_together(tmp_path):
    """Read by its bytes: numpy has no float8."""
    folder = write_model(tmp_path / "base", "qwen3")
    config = read_config(folder)
    base = our_base(config, random_weights(hf_config("qwen3")))
    kept = ("layers.0.self_attn.k_proj", "down_proj")
    save_merged(
        tmp_path / "out",
        in_memory(base),
        config,
        base_folder=folder,
        fp8=Fp8((16, 8), kept),
        shard_bytes=20_000,
    )
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert found["quant_method"] == "fp8"
    assert found["weight_block_size"] == [16, 8]
    assert found["activation_scheme"] == "dynamic"
    of_first = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    downs = {f"model.layers.{layer}.mlp.down_proj" for layer in range(3)}
    assert set(found["modules_to_not_convert"]) == {"lm_head"} | of_first | downs
    tensors = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        content = file.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        header.pop("__metadata__")
        for name, entry in header.items():
            begin, end = (8 + size + at for at in entry["data_offsets"])
            dtype = {"F32": np.float32, "F8_E4M3": ml_dtypes.float8_e4m3fn}[entry["dtype"]]
            tensors[name] = np.frombuffer(content[begin:end], dtype).reshape(entry["shape"])
    weights = random_weights(hf_config("qwen3"))
    scales = {name for name in tensors if name.endswith("_scale_inv")}
    assert tensors.keys() - scales == weights.keys()
    for name, weight in weights.items():
        scale = tensors.get(f"{name}_scale_inv")
        module = name.removesuffix(".weight")
        is_kept = module in found["modules_to_not_convert"] or not name.endswith("_proj.weight")
        assert (scale is None) == is_kept, name
        if scale is None:
            np.testing.assert_array_equal(tensors[name], weight)
        else:
            got = dequantized(tensors[name], scale, (16, 8))
            assert 0 < np.abs(got - weight).max() < np.abs(weight).max() / 20
