"""The number of slots to decode in.

A compiled program serves fewer sequences too, until that has cost as much as compiling one that fits would.
"""

from __future__ import annotations

from collections import defaultdict

from .sampler_rows import SLOT_BUCKETS, bucket_of


class Slots:
    """The slots of programs of one `kind`, which differ in nothing else."""

    def __init__(self) -> None:
        self._compile_seconds: dict[str, dict[int, float]] = defaultdict(dict)
        self._borrowed_seconds: dict[tuple[str, int], float] = defaultdict(float)
        self._most = SLOT_BUCKETS[-1]
        self._counts = (0, 0)

    def fewer(self, needed: int) -> int | None:
        """Choose fewer slots than those for `needed` sequences from now on; return the new maximum, or
        None."""
        smaller = [
            slots for slots in SLOT_BUCKETS if slots < min(self._most, bucket_of(SLOT_BUCKETS, needed))
        ]
        if not smaller:
            return None
        self._most = smaller[-1]
        return self._most

    def take_counts(self) -> tuple[int, int]:
        """Return how many slots were used and how many were empty in the batches since the last call."""
        counts, self._counts = self._counts, (0, 0)
        return counts

    def choose(self, kind: str, needed: int, soon: int) -> int:
        """Choose the slots for `needed` sequences now, and `soon` if all that wait run as well."""
        compiled, fitting = self._compile_seconds[kind], bucket_of(SLOT_BUCKETS, needed)
        if fitting in compiled:
            return fitting
        larger = min((slots for slots in compiled if fitting < slots <= self._most), default=None)
        if larger is None:
            return bucket_of(SLOT_BUCKETS, min(max(needed, soon), self._most))
        return larger if self._borrowed_seconds[kind, fitting] < compiled[larger] else fitting

    def ran(self, kind: str, needed: int, slots: int, seconds: float) -> None:
        """Note a chunk's seconds; a program's first chunk includes its compilation."""
        used, empty = self._counts
        self._counts = used + needed, empty + max(0, slots - needed)
        if slots not in self._compile_seconds[kind]:
            self._compile_seconds[kind][slots] = seconds
        elif (fitting := bucket_of(SLOT_BUCKETS, needed)) < slots:
            self._borrowed_seconds[kind, fitting] += seconds
