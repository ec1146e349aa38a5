"""The input of one call of the decode program: a row per sequence.

Axis letters: S sequences, P pages of a table, M tokens decoded by one call, E stop tokens to compare with.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from .penalties import PenaltyRows
from .token_sampling import SamplingRows


class DecodeRows(NamedTuple):
    """One row per sequence.

    `last_token` is not in the cache yet; its position is `position`, after `position` cached tokens. `budget`
    is the number of tokens that may still be drawn (0 for an empty row). `u` holds the uniforms for the draw
    of each step (`token_sampling.uniforms`). `penalties` is None if no row has any: batches with penalties
    use separate programs, so that other batches do not pay for them. `slot` is that of each sequence's state,
    if the model keeps any."""

    last_token: Int[Array, " S"]
    position: Int[Array, " S"]
    table: Int[Array, "S P"]
    adapter: Int[Array, " S"]
    budget: Int[Array, " S"]
    stop_tokens: Int[Array, "S E"]
    sampling: SamplingRows
    u: Float[Array, "M S 2"]
    penalties: PenaltyRows | None
    slot: Int[Array, " S"] | None = None
