"""PEFT adapters on disk, damaged in every way: an adapter of the model's shapes, or an AdapterError."""

from __future__ import annotations

import json
import pickle
import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz.campaign import campaign
from fuzz.mutations import INTEGERS, mutated_bytes, mutated_json
from safetensors.numpy import save
from tinsmith.ckpt import peft
from tinsmith.model.config import ModelConfig
from tinsmith.model.folder import read_config
from tinsmith.model.lora import pad_rank
from tiny_models import write_model

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_rslora": False}
CONFIG |= {"base_model_name_or_path": "tiny", "target_modules": ["q_proj", "k_proj"], "exclude_modules": None}
CONFIG |= {"rank_pattern": {"k_proj": 1}, "alpha_pattern": {"layers.1.self_attn.q_proj": 2.5}}
CONFIG |= {"layers_to_transform": None, "layers_pattern": None, "init_lora_weights": True}
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
DTYPES = ["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X", "", None, 3]


@dataclass(frozen=True)
class Adapter:
    directory: Path
    config: ModelConfig
    tensors: bytes


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    folder = tmp_path_factory.mktemp("adapters")
    config = read_config(write_model(folder / "model", tokenizer=False))
    directory = folder / "a"
    directory.mkdir()
    tensors = {}
    for layer in range(2):
        _, into, out, *_ = config.layers[layer].mixer.sites[0]
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{module}.lora_A.weight"] = np.ones((2, into), np.float32)
        tensors[f"{module}.lora_B.weight"] = np.ones((out, 2), np.float32)
    return Adapter(directory, config, save(tensors))


def change(rng: random.Random) -> random.Random:
    """The case is made beside the adapter, from these random numbers."""
    return random.Random(rng.getrandbits(64))


def _config(rng: random.Random) -> bytes:
    data = json.dumps(mutated_json(rng, CONFIG) if rng.random() < 0.6 else CONFIG).encode()
    if rng.random() < 0.02:
        return rng.choice((b"", b"[" * 100_000, b"\xff\xfe", b'{"a":' * 60_000, pickle.dumps(CONFIG)))
    return mutated_bytes(rng, data, 2) if rng.random() < 0.1 else data


def _tensors(rng: random.Random, valid: bytes) -> bytes:
    match rng.randrange(8):
        case 0:
            return valid
        case 1:
            return mutated_bytes(rng, valid)
        case 2:  # a header that says it is of another length
            return struct.pack("<Q", rng.choice(INTEGERS) % (1 << 64)) + valid[8:]
        case 3:
            size = struct.unpack("<Q", valid[:8])[0]
            return valid[: 8 + size][: rng.randrange(8 + size + 1)]
        case 4 if rng.random() < 0.2:
            return pickle.dumps({"weight": np.ones(3)})
        case _:
            return _with_header(rng, valid)


def _with_header(rng: random.Random, valid: bytes) -> bytes:
    """Another name, dtype, shape or place of some tensor, in a header that is JSON."""
    size = struct.unpack("<Q", valid[:8])[0]
    header: dict[str, Any] = json.loads(valid[8 : 8 + size])
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*header])
        entry = header[name]
        match rng.randrange(5):
            case 0:
                header[rng.choice((name + "x", name.replace("q_proj", "k_proj"), "", "../x"))] = header.pop(
                    name
                )
            case 1:
                entry["dtype"] = rng.choice(DTYPES)
            case 2:
                entry["shape"] = [rng.choice(INTEGERS) for _ in range(rng.randrange(4))]
            case 3:
                entry["shape"] = entry["shape"][::-1] if rng.random() < 0.5 else [1, *entry["shape"]]
            case _:
                entry["data_offsets"] = [rng.choice(INTEGERS), rng.choice(INTEGERS)]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + valid[8 + size :]


@campaign(change)
def test_adapters(rng: random.Random, adapter: Adapter) -> None:
    (adapter.directory / peft.CONFIG_FILE).write_bytes(_config(rng))
    (adapter.directory / peft.ADAPTER_FILE).write_bytes(_tensors(rng, adapter.tensors))
    try:
        saved = peft.load_adapter(adapter.directory, adapter.config)
    except peft.AdapterError:
        return
    assert np.isfinite(saved.alpha)
    assert isinstance(saved.base_model, str)
    sites = {site.name: site for site in adapter.config.layers[0].sites}
    rank = pad_rank(saved.rank)
    for name, pair in saved.adapter["layers"].items():
        _, into, out, *_ = sites[name]
        for side, shape in (("a", (into, rank)), ("b", (rank, out))):
            assert pair[side].shape == (adapter.config.num_layers, *shape)
            assert pair[side].dtype == np.float32


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not an object"),
        (b"{}", "peft_type is None"),
        (b'{"peft_type": "LORA"}', "r is None; a rank must be"),
        (b'{"peft_type": "LORA", "r": 100000, "lora_alpha": 1}', "r is 100000; a rank must be"),
        (b'{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}', "lora_alpha is nan"),
        (b'{"peft_type": "LORA", "r": 2, "lora_alpha": 5e-324}', "lora_alpha is 5e-324"),
        (b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1, "base_model_name_or_path": 3}', "not a string"),
    ],
)
def test_invalid_configs(adapter: Adapter, config: bytes, reason: str) -> None:
    (adapter.directory / peft.CONFIG_FILE).write_bytes(config)
    (adapter.directory / peft.ADAPTER_FILE).write_bytes(adapter.tensors)
    with pytest.raises(peft.AdapterError, match=reason):
        peft.load_adapter(adapter.directory, adapter.config)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (pickle.dumps({"weight": 1}), "not safetensors"),
        (struct.pack("<Q", 1 << 62) + b"{}", "not safetensors"),
        (save({"x": np.ones(3, np.int64)}), "x is int64, not a float"),
        (save({f"{MODULE}.lora_A.weight": np.ones((2, 32), np.float32)}), "q_proj has only one of"),
    ],
    ids=["pickle", "header of 2^62 bytes", "integers", "a without b"],
)
def test_invalid_tensors(adapter: Adapter, tensors: bytes, reason: str) -> None:
    (adapter.directory / peft.CONFIG_FILE).write_text(json.dumps(CONFIG))
    (adapter.directory / peft.ADAPTER_FILE).write_bytes(tensors)
    with pytest.raises(peft.AdapterError, match=reason):
        peft.load_adapter(adapter.directory, adapter.config)
