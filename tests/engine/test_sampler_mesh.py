"""Sampling on 8 virtual devices is sampling on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "meshes"),
    [("qwen3", ["data=2,fsdp=2,tensor=2"]), ("qwen3_moe", ["expert=8", "data=2,expert=2,tensor=2"])],
)
def test_samples_are_the_same_on_every_mesh(variant, meshes):
    script = Path(__file__).with_name("sample_on_meshes.py")
    env = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(script.parents[1]),
    }
    ran = subprocess.run(
        [sys.executable, str(script), variant, *meshes], env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert ran.stdout.count("equal") == 2 * len(meshes)
