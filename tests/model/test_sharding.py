"""A mesh changes no number: trunk outputs and gradients on 8 virtual CPU devices equal one device's."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from tinsmith.model import sharding
from tinsmith.model.folder import read_config
from tiny_models import write_model


@pytest.mark.parametrize(
    ("variant", "meshes"),
    [
        ("llama3", ["data=2,fsdp=2,tensor=2"]),
        pytest.param("llama3", ["fsdp=8", "tensor=8"], marks=pytest.mark.slow),
        pytest.param("qwen2", ["data=2,fsdp=2,tensor=2"], marks=pytest.mark.slow),
        ("qwen3", ["data=2,fsdp=2,tensor=2"]),
        pytest.param("mistral", ["data=2,fsdp=2,tensor=2"], marks=pytest.mark.slow),
        pytest.param("phi3", ["data=2,fsdp=2,tensor=2"], marks=pytest.mark.slow),
        pytest.param("gemma3_text", ["data=2,fsdp=2,tensor=2"], marks=pytest.mark.slow),
        ("qwen3_moe", ["data=2,fsdp=2,tensor=2", "data=2,expert=4"]),
        pytest.param(
            "qwen3_moe", ["expert=4,tensor=2,turns", "fsdp=2,expert=4,turns"], marks=pytest.mark.slow
        ),
        pytest.param(
            "gpt_oss", ["data=2,fsdp=2,tensor=2", "fsdp=2,expert=2,tensor=2"], marks=pytest.mark.slow
        ),
        ("deepseek_v3", ["data=2,fsdp=2,tensor=2", "expert=8"]),
        pytest.param("qwen3_5", ["data=2,fsdp=2,tensor=2"], marks=pytest.mark.slow),
        pytest.param("qwen3_5_moe", ["data=2,fsdp=2,tensor=2"], marks=pytest.mark.slow),
        ("nemotron_h", ["data=2,fsdp=2,tensor=2"]),
        pytest.param("nemotron_h", ["data=2,expert=4"], marks=pytest.mark.slow),
        pytest.param("qwen3_5_moe", ["fsdp=2,expert=4"], marks=pytest.mark.slow),
    ],
)
def test_meshes_of_8_devices_equal_one_device(variant, meshes):
    """Each mesh in a process of its own kind of machine: XLA's device count is fixed at start."""
    env = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    script = Path(__file__).with_name("compare_meshes.py")
    ran = subprocess.run(
        [sys.executable, str(script), variant, *meshes], env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert ran.stdout.count("equal") == len(meshes)
    assert "rematerialization" not in ran.stderr


def test_axes_that_do_not_divide_a_dimension_stay_whole():
    mesh = AbstractMesh((2, 2, 1, 2), sharding.MESH_AXES)
    spec = sharding.partition_spec((320, 33), ("vocab", "embed"), mesh)
    assert spec == PartitionSpec(("tensor",), None)
    assert sharding.partition_spec((6, 10), ("rows", "tokens"), mesh) == PartitionSpec(("data",), None)


@pytest.mark.parametrize("variant", ["llama", "phi3", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_5_moe"])
def test_fsdp_cuts_stacks_of_matrices_along_their_first_axis(tmp_path, variant):
    """Along another one, XLA would lay a stack of layers out anew to gather it."""
    config = read_config(write_model(tmp_path, variant))
    mesh = AbstractMesh((1, 2, 1, 1), sharding.MESH_AXES)
    for site in (site for layer in config.layers for site in layer.sites):
        first, *others = sharding.partition_spec((site.into, site.out), site.axes, mesh)
        assert first is not None, site.name
        assert others == [None], site.name


def test_every_mesh_axis_of_the_rules_is_known():
    assert {axis for axes in sharding.RULES.values() for axis in axes} <= {*sharding.MESH_AXES}


def test_a_mesh_axis_cuts_one_dimension_of_a_matrix():
    """Over `expert`, experts are divided and dense matrices are cut as over `fsdp`."""
    mesh, axes = AbstractMesh((1, 2, 4, 1), sharding.MESH_AXES), ("experts", "embed", "ff")
    assert sharding.partition_spec((8, 64, 24), axes, mesh) == PartitionSpec(("expert",), ("fsdp",), None)
    assert sharding.partition_spec((6, 64, 24), axes, mesh) == PartitionSpec(None, ("fsdp", "expert"), None)
    assert sharding.partition_spec((64, 24), axes[1:], mesh) == PartitionSpec(("fsdp", "expert"), None)


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(ValueError, match=rf"needs 64 devices, and there are {jax.device_count()}"):
        sharding.make_mesh({"fsdp": 64})
    with pytest.raises(ValueError, match="unknown mesh axes"):
        sharding.make_mesh({"fdsp": 1})
