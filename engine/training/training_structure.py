"""Structures that decide which program a training step needs: the models' and the batch's."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ...losses import MAX_CONFIG
from ...model import sharding
from ...model.lora import pad_rank
from ..messages import LoraSpec
from .train_step import BATCH_INPUTS, Batch


def structure(lora: LoraSpec | None) -> tuple | None:
    """Return the ranks and parts that decide the shapes of an adapter on this base model; None for full
    weights."""
    if lora is None:
        return None
    return pad_rank(lora.rank), lora.train_attn, lora.train_mlp, lora.train_unembed


def describe(key: tuple | None, batch: Batch | None = None, n: int = 1, sequence_level: bool = False) -> str:
    """Return a program's parameters, for its name in the log."""
    if key is None:
        text = "full weights"
    else:
        parts = [name for name, on in zip(("attn", "mlp", "unembed"), key[1:], strict=True) if on]
        text = f"rank {key[0]} {'+'.join(parts)}"
    if batch is not None:
        rows, length, targets = batch.targets.shape
        text += f" {rows}x{length}" + (f" {targets} targets" if targets > 1 else "")
        text += "" if batch.experts is None else " given experts"
    return text + (f" {n} models" if n > 1 else "") + (" sequence-level" if sequence_level else "")


def abstract_batch(mesh: Mesh, rows: int, length: int) -> Batch:
    """Return shapes, dtypes and shardings of a micro-batch with one target per token."""

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows_sharding(mesh, shape))

    per_token = partial(array, jnp.int32, rows, length)
    inputs = {name: array(jnp.float32, rows, length, 1) for name in BATCH_INPUTS}
    return Batch(
        tokens=per_token(),
        position=per_token(),
        start=per_token(),
        real=array(jnp.bool_, rows, length, 1),
        targets=per_token(1),
        inputs=inputs,
        adapter=array(jnp.int32, rows),
        loss=array(jnp.int32, rows),
        config=array(jnp.float32, rows, MAX_CONFIG),
    )
