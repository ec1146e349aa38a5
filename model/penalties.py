"""Repetition, presence and frequency penalties on tokens that a sequence already contains.

The definitions are those of vLLM (`vllm/model_executor/layers/utils.py: apply_penalties`): repetition_penalty
after CTRL (arXiv:1909.05858), presence_penalty and frequency_penalty as in OpenAI's API reference.

Axis letters: S sequences, V vocabulary, C tokens of a sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class PenaltyRows(NamedTuple):
    """One row per sequence; all values are traced. `repetition` 1, `presence` 0 and `frequency` 0 mean off.

    The first `prompt_length` of `tokens` are the prompt, those up to `length` were generated, and the rest is
    undefined.
    """

    repetition: Float[Array, " S"]
    presence: Float[Array, " S"]
    frequency: Float[Array, " S"]
    tokens: Int[Array, "S C"]
    prompt_length: Int[Array, " S"]
    length: Int[Array, " S"]


class Seen(NamedTuple):
    """The tokens of a sequence: whether each occurs anywhere in it, and how often it was generated."""

    anywhere: Bool[Array, "S V"]
    generated: Int[Array, "S V"]


def seen_so_far(rows: PenaltyRows, vocab_size: int) -> Seen:
    """Count the tokens of each sequence."""
    S, C = rows.tokens.shape
    at = jnp.arange(C)
    sequence = jnp.arange(S)[:, None]
    token = jnp.where(at < rows.length[:, None], rows.tokens, vocab_size)  # outside: dropped
    is_generated = (at >= rows.prompt_length[:, None]).astype(jnp.int32)
    return Seen(
        jnp.zeros((S, vocab_size), bool).at[sequence, token].set(True, mode="drop"),
        jnp.zeros((S, vocab_size), jnp.int32).at[sequence, token].add(is_generated, mode="drop"),
    )


def after(seen: Seen, tokens: Int[Array, " S"]) -> Seen:
    """Return the counts after each sequence has got one more token."""
    sequence = jnp.arange(tokens.shape[0])
    return Seen(seen.anywhere.at[sequence, tokens].set(True), seen.generated.at[sequence, tokens].add(1))


def penalized(logits: Float[Array, "S V"], rows: PenaltyRows, seen: Seen) -> Float[Array, "S V"]:
    """Apply the penalties to logits z. For each token v:

    z_v  ->  z_v / repetition if z_v > 0 else z_v · repetition      where v occurs anywhere,
    z_v  ->  z_v - frequency · (times v was generated) - presence   where v was generated.
    """
    repetition = jnp.where(seen.anywhere, rows.repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    times = seen.generated.astype(logits.dtype)
    return logits - rows.frequency[:, None] * times - rows.presence[:, None] * (times > 0)
