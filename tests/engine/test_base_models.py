"""The parts of the device's memory that a base model has beside its weights."""

import jax.numpy as jnp
import pytest
from tinsmith.engine import base_models, messages
from tinsmith.engine.sampling.sampler import default_kv_cache_tokens
from tinsmith.model import kv_cache
from tinsmith.model.folder import read_config
from tinsmith.model.sharding import make_mesh

from tests.tiny_models import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


def test_keys_and_values_are_derived_from_the_device(folder):
    """A CPU has a gibibyte of them, whatever a token takes, but always room for a whole sequence."""
    config = read_config(folder)
    # keys and values of 3 layers, 2 heads of 8 numbers each
    for dtype, bytes_per_token in ((jnp.float32, 2 * 3 * 2 * 8 * 4), (jnp.bfloat16, 2 * 3 * 2 * 8 * 2)):
        assert kv_cache.bytes_per_token(config, dtype) == bytes_per_token
        assert default_kv_cache_tokens(config, dtype, 512) == 2**30 // bytes_per_token
    assert default_kv_cache_tokens(config, jnp.float32, 10**9) == 2**30 // (2 * 3 * 2 * 8 * 4)


@pytest.mark.parametrize(
    ("given", "bases", "expected"), [(None, 1, 2**30 // 384), (None, 4, 2**28 // 384), (1000, 4, 1000)]
)
def test_base_models_share_what_is_derived_from_the_device(tmp_path, given, bases, expected):
    folders = [write_model(tmp_path / f"m{number}") for number in range(bases)]
    declared = [messages.BaseModel(folder.name, str(folder)) for folder in folders]
    config = messages.EngineConfig("", str(tmp_path), str(tmp_path), declared, kv_cache_tokens=given)
    model = base_models.load(declared[0], config, make_mesh())
    sampler = model.samplers.sampler
    assert sampler._pool.capacity == expected // 64 * 64  # whole pages


def test_two_names_of_one_folder_take_the_memory_of_one(folder, tmp_path):
    declared = [messages.BaseModel(name, str(folder)) for name in ("a", "b")]
    rooms = [
        base_models.EngineMemory.of(messages.EngineConfig("", str(tmp_path), "", some), make_mesh())
        for some in (declared, declared[:1])
    ]
    assert rooms[0].plan.base == rooms[1].plan.base
    assert rooms[0].plan.kv_tokens == rooms[1].plan.kv_tokens
