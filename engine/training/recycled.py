"""Trees of arrays that are kept for reuse, within a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import jax


class RecycledTrees:
    """Trees by their structure, of at most `max_bytes`: those of the least recently used go first."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._trees: OrderedDict[Hashable, list[Any]] = OrderedDict()  # used last comes last
        self.bytes = 0

    def take(self, structure: Hashable) -> Any | None:
        """Return a tree of that structure, no longer kept here; None if there is none."""
        if structure not in self._trees:
            return None
        trees = self._trees[structure]
        tree = trees.pop()
        self.bytes -= _bytes(tree)
        if trees:
            self._trees.move_to_end(structure)
        else:
            del self._trees[structure]
        return tree

    def put(self, structure: Hashable, tree: Any) -> None:
        """Keep a tree, unless it alone exceeds the limit."""
        if _bytes(tree) > self._max_bytes:
            return
        self._trees.setdefault(structure, []).append(tree)
        self._trees.move_to_end(structure)
        self.bytes += _bytes(tree)
        while self.bytes > self._max_bytes:
            structure, trees = next(iter(self._trees.items()))
            self.bytes -= _bytes(trees.pop())
            if not trees:
                del self._trees[structure]

    def clear(self) -> None:
        self._trees.clear()
        self.bytes = 0


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
