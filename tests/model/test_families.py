"""Log-probs of every family equal transformers', packed and unpacked, in float32."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tinsmith.model import decoder
from tinsmith.model.config import DeltaNet
from tiny_models import VARIANTS

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference

ATOL = 1e-4


def log_probs(tiny, tokens, position, start):
    hidden = jax.jit(decoder.trunk, static_argnums=0)(tiny.graph, tiny.base, tokens, position, start)
    return np.asarray(jax.nn.log_softmax(hidden @ decoder.unembed(tiny.base).T))


@contextmanager
def wide_casts(model) -> Iterator[None]:
    """While it lasts, what the code of a transformers model casts to float32 becomes float64."""

    class Wide:
        def __getattr__(self, name):
            return torch.float64 if name in ("float32", "float") else getattr(torch, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[type(model).__module__], "torch", Wide())
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def reference_log_probs(tiny, tokens):
    """Log-probs by transformers in float32, or in float64 for models with delta nets.

    Those norm each head's output, also one in which nearly everything cancels, so that float32's rounding
    counts: transformers' log-probs are then up to 1e-4 from those of float64, and could be no reference."""
    from transformers import AutoModelForCausalLM

    def log_probs(model):
        with torch.no_grad():
            return [torch.log_softmax(model(torch.tensor(t[None])).logits[0], -1).numpy() for t in tokens]

    def loaded(**options):
        return AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32, **options)

    if not any(isinstance(mixer, DeltaNet) for mixer in tiny.config.mixers):
        return log_probs(loaded())
    model = loaded(experts_implementation="eager")  # torch has no grouped products of float64
    with wide_casts(model):
        return log_probs(model.double())


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_log_probs_are_those_of_transformers_on_each_sequence_alone(tiny, packed_rows, variant):
    model = tiny(variant)
    ours = log_probs(model, *map(jnp.asarray, packed_rows[:3]))
    sequences = [packed_rows.tokens[row, at] for row, at in packed_rows.segments]
    for (row, at), reference in zip(packed_rows.segments, reference_log_probs(model, sequences), strict=True):
        np.testing.assert_allclose(ours[row, at], reference, atol=ATOL)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_sequence_a_row_is_transformers(tiny, variant):
    model = tiny(variant)
    # longer than llama3's original context (64), and not a multiple of the attention's blocks
    tokens = np.random.default_rng(0).integers(0, 320, (1, 301)).astype(np.int32)
    position = np.arange(301, dtype=np.int32)[None]
    ours = log_probs(model, *map(jnp.asarray, (tokens, position, np.zeros_like(position))))
    np.testing.assert_allclose(ours[0], reference_log_probs(model, tokens)[0], atol=ATOL)
