"""One budget for everything that can leave the device: the least recently used gives way.

What leaves can come back (weights, from the host's memory or the disk) or be made again (stacks, zeros). The
base, programs and KV pages are outside of the budget: `memory.plan_engine` says how much is left for it.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol


class Holder(Protocol):
    """Holds arrays of one kind (`memory.KINDS`) on the device."""

    kind: str
    may_leave: bool
    """True if its items may leave. Items that never do are reported, but do not use up the budget."""

    @property
    def bytes(self) -> int:
        """The bytes that it holds on the device."""
        ...

    @property
    def oldest(self) -> int | None:
        """The time of use of the least recently used item (`Budget.now`); None if nothing may leave now."""
        ...

    def drop_oldest(self) -> None:
        """Let the least recently used item leave the device."""
        ...


class Budget:
    """A budget of `max_bytes` over all holders. Items in use stay, whatever their size."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._holders: weakref.WeakSet[Holder] = (
            weakref.WeakSet()
        )  # a failed sampler is gone, and its stacks with it
        self._ticks = itertools.count()

    def add(self, holder: Holder) -> None:
        self._holders.add(holder)

    def now(self) -> int:
        """Return a number for a use; later ones are larger."""
        return next(self._ticks)

    @property
    def bytes(self) -> int:
        return sum(holder.bytes for holder in self._holders if holder.may_leave)

    def by_kind(self) -> dict[str, int]:
        """Return the bytes that are held, by kind, including those that never leave."""
        kinds: dict[str, int] = {}
        for holder in self._holders:
            kinds[holder.kind] = kinds.get(holder.kind, 0) + holder.bytes
        return kinds

    def make_room(self, size: int) -> None:
        """Let the least recently used items leave until `size` more bytes fit, or no more may leave."""
        while self.bytes + size > self.max_bytes and self._drop_oldest():
            pass

    def give_up(self, size: int) -> None:
        """Let the least recently used items leave until `size` bytes have left, or none is left that may."""
        goal = self.bytes - size
        while self.bytes > goal and self._drop_oldest():
            pass

    def _drop_oldest(self) -> bool:
        ages = [(oldest, holder) for holder in self._holders if (oldest := holder.oldest) is not None]
        if not ages:
            return False
        min(ages, key=lambda each: each[0])[1].drop_oldest()
        return True
