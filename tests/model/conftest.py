"""Tiny models, written once a session and loaded in float32."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from tinsmith.model import decoder, load
from tinsmith.model.config import ModelConfig
from tinsmith.model.folder import read_config
from tiny_models import write_model


class Tiny(NamedTuple):
    folder: object
    config: ModelConfig
    graph: object
    base: dict


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`tiny("qwen3")`: the folder, config, graph and float32 base of a variant."""
    made = {}

    def make(variant: str) -> Tiny:
        if variant not in made:
            folder = write_model(tmp_path_factory.mktemp(variant), variant, shards=2)
            config = read_config(folder)
            graph, _ = decoder.build(config, jnp.float32)
            made[variant] = Tiny(folder, config, graph, load.load_base(folder, config, jnp.float32))
        return made[variant]

    return make


class Rows(NamedTuple):
    """Segments packed into rows: tokens, positions, starts, and where each segment lies."""

    tokens: np.ndarray
    position: np.ndarray
    start: np.ndarray
    segments: list  # of (row, slice)


@pytest.fixture(scope="session")
def packed_rows():
    """Two rows of 160 tokens: three segments and some padding; two segments and none."""
    rng = np.random.default_rng(3)
    T, lengths = 160, ((70, 1, 60), (97, 63))
    tokens = rng.integers(0, 320, (2, T)).astype(np.int32)
    position, segments = np.zeros((2, T), np.int32), []
    start = np.tile(np.arange(T, dtype=np.int32), (2, 1))  # padding sees itself
    for row, cuts in enumerate(lengths):
        begin = 0
        for length in cuts:
            at = slice(begin, begin + length)
            position[row, at], start[row, at] = np.arange(length), begin
            segments.append((row, at))
            begin += length
    return Rows(tokens, position, start, segments)
