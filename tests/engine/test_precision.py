"""float32 is float32 on every backend, and GPUs are told to be deterministic."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from tinsmith.engine import precision, xla_flags


def lowered(dtype) -> str:
    """A product of two matrices, as it is handed to a compiler."""
    matrix = jax.ShapeDtypeStruct((8, 8), dtype)
    return jax.jit(lambda x, y: x @ y).lower(matrix, matrix).as_text()


@pytest.mark.parametrize(
    ("dtype", "platform", "is_exact"),
    [
        (jnp.float32, "gpu", True),
        (jnp.float32, "tpu", True),
        (jnp.float32, "cpu", False),
        (jnp.bfloat16, "gpu", False),
    ],
)
def test_products_of_float32_ask_for_float32(dtype, platform, is_exact):
    before = jax.config.jax_default_matmul_precision
    try:
        precision.set_precision(dtype, platform)
        assert ("precision = [HIGHEST, HIGHEST]" in lowered(dtype)) == is_exact
    finally:
        jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "--xla_gpu_exclude_nondeterministic_ops=true"),
        ("--xla_a=1", "--xla_a=1 --xla_gpu_exclude_nondeterministic_ops=true"),
        ("--xla_gpu_deterministic_ops=true", "--xla_gpu_deterministic_ops=true"),
        ("--xla_gpu_exclude_nondeterministic_ops=false", "--xla_gpu_exclude_nondeterministic_ops=false"),
    ],
)
def test_deterministic_operations_are_asked_for_unless_the_operator_has_said_otherwise(flags, expected):
    assert xla_flags.deterministic(flags) == expected
    assert xla_flags.is_deterministic(expected) == ("false" not in flags)
    assert not xla_flags.is_deterministic("--xla_a=1")


def test_the_compiler_knows_the_flag():
    """An unknown flag would end the engine as it starts."""
    environment = os.environ | {"XLA_FLAGS": xla_flags.deterministic(""), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    assert subprocess.run(command, env=environment, timeout=300).returncode == 0
