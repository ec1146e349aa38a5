"""What the decode program does not compute anew for each token and layer. Its results: tests/engine."""

import jax.numpy as jnp
import numpy as np
from tinsmith.model import kv_cache
from tinsmith.model.decode import DecodeRows, decode
from tinsmith.model.token_sampling import SamplingRows


def test_rotations_are_computed_once(tiny):
    model = tiny("llama")
    S, P, M = 2, 1, 4
    rows = DecodeRows(
        last_token=np.full(S, 5, np.int32),
        position=np.full(S, 3, np.int32),
        table=np.arange(1, 1 + S * P, dtype=np.int32).reshape(S, P),
        adapter=np.zeros(S, np.int32),
        budget=np.full(S, M, np.int32),
        stop_tokens=np.full((S, 8), -1, np.int32),
        sampling=SamplingRows(np.ones(S, np.float32), np.full(S, -1, np.int32), *np.ones((2, S), np.float32)),
        u=np.zeros((M, S, 2), np.float32),
        penalties=None,
    )
    pages = kv_cache.make_pages(model.config, 1 + S * P, 16, jnp.float32)
    program = decode.lower(model.graph, model.base, pages, None, rows, np.bool_(False))
    text = program.compile().as_text()
    assert model.config.num_layers > 1
    assert (text.count(" cosine("), text.count(" sine(")) == (1, 1)
