"""The rows of prompts that prefill runs, and what its layers keep of them on every backend.

Axis letters: S rows, T tokens of a row, P pages of a table, L layers, k experts of a token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Array, Int

from .config import Attention, Latent, Recurrent, States
from .kv_cache import Cache
from .recurrent import mix_on
from .states import State

EXPERTS = -1
"""The key of the chosen experts among what layers keep; the other keys are the numbers of cached kinds."""


class PrefillRows(NamedTuple):
    """Rows of prompt tokens. A row holds several whole prompts, or one that continues the pages of its
    `table`.

    `start` is the first token of the row that belongs to the same prompt. `page` and `offset` are the place
    for each token's key and value (page 0 for padding). The first `context` positions of a row's `table` are
    the cached beginning of its prompt; the tables of whole prompts have no pages.

    If the model keeps states of sequences, each row has one prompt, and `slot` is that of its state.
    """

    tokens: Int[Array, "S T"]
    position: Int[Array, "S T"]
    start: Int[Array, "S T"]
    page: Int[Array, "S T"]
    offset: Int[Array, "S T"]
    table: Int[Array, "S P"]
    context: Int[Array, " S"]
    slot: Int[Array, " S"] | None = None


class WithState:
    """Mixes rows of prompts in a layer with states. `kept` is each row's state at the end of its tokens."""

    def __init__(self, mixer: Recurrent, cache: Cache, number: Array, rows: PrefillRows):
        self._mixer, self._cache, self._number, self._rows = mixer, cache, number, rows
        self.kept: dict[int, State] = {}

    def __call__(self, tokens: Any, weights: Any) -> Array:
        rows, cache, kind = self._rows, self._cache, self._mixer.cached
        assert rows.slot is not None
        before = cache.states(kind).read(self._number, rows.slot, rows.context == 0)
        out, after = mix_on(self._mixer, tokens, weights, before, rows.start == 0)
        self.kept[cache.kinds.index(kind)] = after
        return out


def with_states(cache: Cache, rows: PrefillRows, kept: dict[int, Any]) -> Cache:
    """Write the states of all layers, [L S ...] by kind, to the rows' slots."""
    for at, kind in enumerate(cache.kinds):
        if isinstance(kind, States):
            slots = cache.states(kind).written(slice(None), rows.slot, kept[at])
            cache = cache.updated(kind, slots)
    return cache


def is_expanded(mixer: Attention | Latent, rows: PrefillRows) -> bool:
    """Return whether latent attention expands the keys and values of these rows.

    It takes fewer operations where no stored position is read: keys and values have fewer numbers expanded
    than latents have, and the matrix is multiplied with as many vectors either way."""
    return isinstance(mixer, Latent) and not rows.table.shape[1]


def by_token(routes: list[Array]) -> dict[Any, Array]:
    """Return what a layer keeps of the experts that it has chosen, [S T k], if any."""
    return {} if not routes else {EXPERTS: routes[0].reshape(-1, routes[0].shape[-1])}
