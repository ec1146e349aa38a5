"""Trees of arrays that are kept for reuse, within the engine's budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import jax

from ..budget import Budget


class RecycledTrees:
    """Trees by their structure; the least recently used ones are dropped first."""

    kind = "zeros"
    may_leave = True

    def __init__(self, budget: Budget):
        self._budget = budget
        self._trees: OrderedDict[Hashable, list[Any]] = OrderedDict()  # used last comes last
        self._used: dict[Hashable, int] = {}
        self.bytes = 0
        budget.add(self)

    def take(self, structure: Hashable) -> Any | None:
        """Return a tree of that structure, no longer kept here; None if there is none."""
        if structure not in self._trees:
            return None
        self._use(structure)
        return self._pop(structure)

    def put(self, structure: Hashable, tree: Any) -> None:
        """Keep a tree, unless it alone exceeds the budget."""
        if _bytes(tree) > self._budget.max_bytes:
            return
        self._budget.make_room(_bytes(tree))
        self._trees.setdefault(structure, []).append(tree)
        self._use(structure)
        self.bytes += _bytes(tree)

    def clear(self) -> None:
        self._trees.clear()
        self._used.clear()
        self.bytes = 0

    @property
    def oldest(self) -> int | None:
        return self._used[next(iter(self._trees))] if self._trees else None

    def drop_oldest(self) -> None:
        self._pop(next(iter(self._trees)))

    def _use(self, structure: Hashable) -> None:
        self._trees.move_to_end(structure)
        self._used[structure] = self._budget.now()

    def _pop(self, structure: Hashable) -> Any:
        trees = self._trees[structure]
        tree = trees.pop()
        self.bytes -= _bytes(tree)
        if not trees:
            del self._trees[structure], self._used[structure]
        return tree


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
