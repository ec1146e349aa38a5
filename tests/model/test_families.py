"""Log-probs of every family equal transformers', packed and unpacked, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tinsmith.model import decoder
from tinsmith.model.config import DeltaNet
from tiny_models import VARIANTS

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference


def log_probs(tiny, tokens, position, start):
    hidden = jax.jit(decoder.trunk, static_argnums=0)(tiny.graph, tiny.base, tokens, position, start)
    return np.asarray(jax.nn.log_softmax(hidden @ decoder.unembed(tiny.base).T))


def reference_log_probs(tiny, tokens):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    with torch.no_grad():
        return [torch.log_softmax(model(torch.tensor(t[None])).logits[0], -1).numpy() for t in tokens]


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_log_probs_are_those_of_transformers_on_each_sequence_alone(tiny, packed_rows, variant):
    model = tiny(variant)
    ours = log_probs(model, *map(jnp.asarray, packed_rows[:3]))
    sequences = [packed_rows.tokens[row, at] for row, at in packed_rows.segments]
    far, has_delta_nets = [], any(isinstance(mixer, DeltaNet) for mixer in model.config.mixers)
    for (row, at), reference in zip(packed_rows.segments, reference_log_probs(model, sequences), strict=True):
        np.testing.assert_allclose(ours[row, at], reference, atol=1e-3 if has_delta_nets else 1e-4)
        far += [*(np.abs(ours[row, at] - reference).max(-1) > 1e-4)]
    # Delta nets norm each head's output, also one in which nearly everything cancels: there, rounding counts.
    assert np.mean(far) < 0.01


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_sequence_a_row_is_transformers(tiny, variant):
    model = tiny(variant)
    # longer than llama3's original context (64), and not a multiple of the attention's blocks
    tokens = np.random.default_rng(0).integers(0, 320, (1, 301)).astype(np.int32)
    position = np.arange(301, dtype=np.int32)[None]
    ours = log_probs(model, *map(jnp.asarray, (tokens, position, np.zeros_like(position))))
    np.testing.assert_allclose(ours[0], reference_log_probs(model, tokens)[0], atol=1e-4)
