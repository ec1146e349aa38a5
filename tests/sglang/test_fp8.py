"""SGLang reads our float8 files as they are meant.

Its CPU backend has float8 only with Intel's AMX, so no server is asked here: its own functions, taken from
its files as they are, turn what we wrote into numbers again.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, Union

import numpy as np
import pytest
from tinsmith.ckpt.fp8 import Fp8
from tinsmith.ckpt.merged import in_memory, save_merged
from tinsmith.model.folder import read_config

from tests.ckpt.test_merged import our_base
from tests.tiny_models import hf_config, random_weights, write_model

torch = pytest.importorskip("torch")


@pytest.fixture(scope="session")
def quantization(sglang_python: Path) -> Path:
    (layers,) = (sglang_python.parents[1] / "lib").glob("python3*/site-packages/sglang/srt/layers")
    return layers / "quantization"


def function_of(file: Path, name: str) -> Any:
    """A function of a file without what the file imports, which takes ten seconds."""
    module = ast.parse(file.read_text())
    module.body = [each for each in module.body if isinstance(each, ast.FunctionDef) and each.name == name]
    names = {"torch": torch, "List": list, "Union": Union}  # those of its annotations
    exec(compile(module, str(file), "exec"), names)
    return names[name]


def logprobs(folder: Path, weights: dict[str, Any]) -> Any:
    """Return transformers' log-probs of 64 tokens for the folder's model with some of its weights
    replaced."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    tokens = torch.tensor([np.random.default_rng(0).integers(0, 320, 64).tolist()])
    with torch.no_grad():
        return torch.log_softmax(model(tokens).logits, -1)


@pytest.mark.parametrize("block", [(16, 16), None], ids=["block", "tensor"])
def test_sglang_s_own_functions_read_what_is_near(tmp_path: Path, quantization: Path, block: Any) -> None:
    """Each weight is half a unit in the last place of float8 away at most, with its block's scale. So
    log-probs are nearer than those of weights that all are so far away, some up and some down."""
    from safetensors.torch import load_file

    folder = write_model(tmp_path / "base", "llama")
    weights = random_weights(hf_config("llama"))
    base = in_memory(our_base(read_config(folder), weights))
    save_merged(tmp_path / "out", base, read_config(folder), base_folder=folder, fp8=Fp8(block))
    found = load_file(tmp_path / "out" / "model.safetensors")
    if block is None:
        dequantize = function_of(quantization / "utils.py", "per_tensor_dequantize")
    else:
        of_blocks = function_of(quantization / "fp8_utils.py", "block_quant_dequant")

        def dequantize(weight: Any, scale: Any) -> Any:
            return of_blocks(weight, scale, list(block), torch.float32)

    read, furthest = {}, {}
    for name, array in weights.items():
        weight, read[name] = torch.from_numpy(array), found.pop(name)
        if name.endswith("_proj.weight"):
            assert read[name].dtype == torch.float8_e4m3fn
            scale = found.pop(f"{name}_scale" if block is None else f"{name}_scale_inv")
            assert scale.dtype == torch.float32
            # Three bits of mantissa: half a unit is 2^-4 of the number, or of the smallest normal one.
            smallest = dequantize(torch.full_like(weight, 2.0**-6).to(torch.float8_e4m3fn), scale).float()
            furthest[name] = torch.maximum(weight.abs(), smallest) * 2.0**-4
            read[name] = dequantize(read[name], scale).float()
            error = (read[name] - weight).abs()
            assert error.max() > 0
            assert (error <= furthest[name] * (1 + 1e-6)).all()
    assert not found
    exact = logprobs(folder, {})
    differences = [(logprobs(folder, read) - exact).abs().mean()]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        moved = {
            name: torch.from_numpy(weights[name])
            + far * (torch.randint(0, 2, far.shape, generator=generator) * 2 - 1)
            for name, far in furthest.items()
        }
        differences.append((logprobs(folder, moved) - exact).abs().mean())
    assert 0 < differences[0] < min(differences[1:])
