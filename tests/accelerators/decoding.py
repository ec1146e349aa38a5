"""The sampler's programs as cases of `laboratory.py`: decoding, and prompts with and without a context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tinsmith.model import decoder, kv_cache, lora, sharding
from tinsmith.model.config import ModelConfig
from tinsmith.model.decode import decode
from tinsmith.model.decode_rows import DecodeRows
from tinsmith.model.kernels.backends import current_backend
from tinsmith.model.kernels.paged_attention.pages import LAYOUTS, Pages
from tinsmith.model.prefill import prefill
from tinsmith.model.prefill_rows import PrefillRows
from tinsmith.model.token_sampling import Drawing, SamplingRows

PAGE = 64
STEPS = 16


class Shapes:
    """The abstract arguments that all of the sampler's programs have: weights, pages and adapters."""

    def __init__(self, mesh: Mesh, config: ModelConfig, sequences: int, context: int, adapters: int):
        self.mesh = mesh
        self.graph, base = decoder.build(config, jnp.bfloat16)
        shardings = sharding.shardings_for(base, decoder.logical_axes(config), mesh)
        self.base = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), base, shardings
        )
        self.columns = context // PAGE
        self.cache = self._cache(config, 1 + sequences * self.columns)
        self.lora = self._lora(config, adapters) if adapters else None

    def array(self, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, PartitionSpec()))

    def _cache(self, config: ModelConfig, number: int) -> kv_cache.Cache:
        with jax.set_mesh(self.mesh):
            backend = current_backend()

        def empty(shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
            spec = sharding.partition_spec(shape, axes, self.mesh)
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(self.mesh, spec))

        parts = tuple(
            Pages(
                *map(empty, kv_cache.page_shapes(config, kind, number, PAGE, backend), LAYOUTS[backend]),
                backend,
            )
            for kind in config.cache_kinds
        )
        return kv_cache.Cache(parts, config.cache_kinds, backend, PAGE)

    def _lora(self, config: ModelConfig, adapters: int) -> lora.LoraStack:
        """Adapters of rank 32 on all matrices and the head."""
        one = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, lora.init_lora(config, 0, 32)))
        scale = jnp.ones(adapters)
        stack = jax.eval_shape(
            lambda one: lora.contained(lora.stack_adapters((one,) * adapters, scale), jnp.bfloat16), one
        )
        return jax.tree.map(lambda x: self.array(x.dtype, *x.shape), stack)


def decode_case(
    mesh: Mesh,
    config: ModelConfig,
    *,
    slots: int = 64,
    context: int = 2048,
    adapters: int = 0,
    filtered: int = 0,
) -> Any:
    """16 tokens for each of `slots` sequences of at most `context` positions, which have their own pages."""
    shapes = Shapes(mesh, config, slots, context, adapters)
    array, S = shapes.array, slots
    rows = DecodeRows(
        last_token=array(jnp.int32, S),
        position=array(jnp.int32, S),
        table=array(jnp.int32, S, shapes.columns),
        adapter=array(jnp.int32, S),
        budget=array(jnp.int32, S),
        stop_tokens=array(jnp.int32, S, 8),
        sampling=SamplingRows(
            array(jnp.float32, S), array(jnp.int32, S), array(jnp.float32, S), array(jnp.float32, S)
        ),
        u=array(jnp.float32, STEPS, S, 2),
        penalties=None,
    )
    drawing = Drawing.FILTERED if filtered else Drawing.PLAIN
    return _compile(shapes, decode, rows, array(jnp.bool_), drawing)


def prefill_case(
    mesh: Mesh,
    config: ModelConfig,
    *,
    tokens: int = 1024,
    context: int = 0,
    sequences: int = 64,
    adapters: int = 0,
) -> Any:
    """A row of prompt tokens, after `context` cached positions of the same prompt."""
    shapes = Shapes(mesh, config, sequences, context or 2048, adapters)
    of_tokens = shapes.array(jnp.int32, 1, tokens)
    rows = PrefillRows(
        *[of_tokens] * 5,
        table=shapes.array(jnp.int32, 1, context // PAGE),
        context=shapes.array(jnp.int32, 1),
    )
    return _compile(shapes, prefill, rows)


def _compile(shapes: Shapes, program: Callable, rows: Any, *more: Any) -> Any:
    with jax.set_mesh(shapes.mesh):
        return program.lower(shapes.graph, shapes.base, shapes.cache, shapes.lora, rows, *more).compile()
