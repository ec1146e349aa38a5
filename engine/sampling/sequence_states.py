"""State slots, for the states of sequences (delta nets), and states kept at the ends of prompts and samples.

Keys and values of a prefix are of no use without the state at exactly its end, and a state cannot be cut
shorter. So for models with states, a prompt can begin with cached tokens only where a state was kept. A
prefix state owns a state slot and the pages of all its tokens. Sequences take precedence: the least
recently used prefix states give up their slots and pages when these are needed.

Host side only: `model.kv_cache` has the arrays.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from .page_pool import PagePool
from .sequence import Prompt


@dataclass(eq=False)
class PrefixState:
    """The state after `tokens`, in `slot`, and their pages; `digest` is that of their last full page."""

    digest: bytes
    tokens: np.ndarray
    slot: int
    pages: list[int]


class SequenceStates:
    """State slots 1..num_slots-1, each of them free, a sequence's, or a prefix's. Slot 0 is for padding."""

    def __init__(self, pool: PagePool, num_slots: int):
        self._pool = pool
        self._free = list(range(num_slots - 1, 0, -1))
        self._by_digest: dict[bytes, list[PrefixState]] = {}
        self._kept: OrderedDict[PrefixState, None] = OrderedDict()  # the most recently used comes last

    def allocate(self) -> int | None:
        """Return a slot for a sequence, or None if all are other sequences'."""
        if not self._free and self._kept:
            self._drop_oldest()
        return self._free.pop() if self._free else None

    def release(self, slot: int) -> None:
        if slot:
            self._free.append(slot)

    def free_pages(self, count: int) -> None:
        """Make so many pages free, as far as prefix states hold them."""
        while self._pool.num_free < count and self._kept:
            self._drop_oldest()

    def find(self, prompt: Prompt) -> PrefixState | None:
        """Return the state of the longest prefix of a prompt that may come from the cache, if any."""
        Z = self._pool.page_size
        for count in range(prompt.reusable // Z, -1, -1):
            digest = prompt.digests[count - 1] if count else self._root(prompt.generation.weights.id)
            fitting = [
                each
                for each in self._by_digest.get(digest, ())
                if len(each.tokens) <= prompt.reusable
                and np.array_equal(each.tokens[count * Z :], prompt.tokens[count * Z : len(each.tokens)])
            ]
            if fitting:
                longest = max(fitting, key=lambda each: len(each.tokens))
                self._kept.move_to_end(longest)
                return longest
        return None

    def keep(self, weights_id: int, tokens: np.ndarray, slot: int, pages: list[int]) -> None:
        """Take over a slot with the state after `tokens`, and their pages, as a prefix state."""
        if len(tokens) == 0:  # new sequences need no state
            self._pool.release(pages)
            self.release(slot)
            return
        digests = self._pool.digests(weights_id, tokens)
        digest = digests[-1] if digests else self._root(weights_id)
        pages, more = pages[: self._pool.pages_for(len(tokens))], pages[self._pool.pages_for(len(tokens)) :]
        self._pool.release(more)
        for known in self._by_digest.get(digest, ()):
            if len(known.tokens) == len(tokens) and np.array_equal(
                known.tokens[len(digests) * self._pool.page_size :],
                tokens[len(digests) * self._pool.page_size :],
            ):
                self._kept.move_to_end(known)
                self._pool.release(pages)
                self.release(slot)
                return
        prefix = PrefixState(digest, np.array(tokens, np.int32), slot, pages)
        self._by_digest.setdefault(digest, []).append(prefix)
        self._kept[prefix] = None

    def forget(self) -> None:
        """Drop all prefix states."""
        while self._kept:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        prefix, _ = self._kept.popitem(last=False)
        alike = self._by_digest[prefix.digest]
        alike.remove(prefix)
        if not alike:
            del self._by_digest[prefix.digest]
        self._pool.release(prefix.pages)
        self.release(prefix.slot)

    @staticmethod
    def _root(weights_id: int) -> bytes:
        """Return what stands for the digest of the last full page where there is none."""
        return weights_id.to_bytes(8, "little")
