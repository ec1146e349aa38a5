"""Packing: datums of any lengths into rows of few fixed shapes.

A row [T] holds whole datums one after the other; a micro-batch is B rows of equal T. Programs are compiled
per (T, B), so both come from one small table that depends on the model and the device, never on the data.
Pure NumPy, no arrays on devices.

Axis letters: B rows, T tokens in a row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

ROW_MULTIPLE_OF = 8  # row lengths are rounded up to this
MANY_ROWS = 4096  # micro-batches of at least this many tokens hold several rows
SHORTEST_ROW, SHORTEST_ROW_OF_MANY = 128, 512
PARTS_OF_A_MICRO_BATCH = (1 / 8, 3 / 8, 1 / 2, 1)  # chosen for the least padding on mixed lengths
# Measured with SmolLM2-135M on a CPU: 1.46 times as long per token in rows of 1024 as in rows of 512.
ATTENTION_LENGTH, ATTENTION_LENGTH_OF_MANY = 1024, 4096


@dataclass(frozen=True)
class ShapeTable:
    """The shapes (T, B) that micro-batches may have, and their costs, in units of one token's products."""

    rows: dict[int, tuple[int, ...]]  # T, ascending -> allowed B, ascending
    micro_batch_tokens: int
    attention_length: int  # a row of this length spends as much in attention as in all products

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(length, count) for length, counts in self.rows.items() for count in counts]

    @property
    def max_length(self) -> int:
        return max(self.rows)

    def cost(self, length: int, rows: int) -> float:
        """Return the cost of one micro-batch: products, attention, and a price per dispatch."""
        return rows * length * (1 + length / self.attention_length) + self.micro_batch_tokens / 32

    def smallest_row(self, length: int) -> int:
        return next(row for row in self.rows if row >= length)

    def halved(self) -> ShapeTable:
        """Return a table with half as many tokens per micro-batch, and for longer rows the fewest."""
        tokens = self.micro_batch_tokens // 2
        rows = {
            length: tuple(count for count in counts if count * length <= tokens) or counts[:1]
            for length, counts in self.rows.items()
        }
        return ShapeTable(rows, tokens, self.attention_length)


def shape_table(
    max_length: int, micro_batch_tokens: int, row_multiple: int = 1, on_cpu: bool = False
) -> ShapeTable:
    """Return a table for datums of up to `max_length` tokens, and micro-batches of about
    `micro_batch_tokens`.

    Large micro-batches (an accelerator's, and a CPU's for a mixture of many experts) have rows at steps of
    4, and 1, 4, 16, ... rows of each length, or as many as fill them; on a CPU also one short row. Small ones
    (a CPU's otherwise) are one row each; up to the micro-batch's own length the row lengths are finely
    stepped, because a dispatch costs little there. The number of rows is a multiple of `row_multiple`, the
    number of devices that share them. There are 6 to 9 shapes.
    """
    many = micro_batch_tokens // row_multiple >= MANY_ROWS
    if many:
        lengths = _ladder(SHORTEST_ROW_OF_MANY, max_length, 4.0)
    else:
        shortest = min(SHORTEST_ROW, max_length)
        lengths = _ladder(shortest, max_length, (max_length / shortest) ** (1 / 5) + 1e-9)
        if max_length > micro_batch_tokens:
            lengths = {int(part * micro_batch_tokens) for part in PARTS_OF_A_MICRO_BATCH}
            lengths |= _ladder(micro_batch_tokens, max_length, 4.0)
    table = {}
    for length in sorted(lengths):
        counts = [row_multiple]
        while many and 4 * counts[-1] * length <= micro_batch_tokens:
            counts.append(4 * counts[-1])
        if many and 2 * counts[-1] * length <= micro_batch_tokens:
            counts.append(2 * counts[-1])
        table[length] = tuple(counts)
    if many and on_cpu and min(table) > SHORTEST_ROW:
        table = {SHORTEST_ROW: (row_multiple,)} | table
    as_long = ATTENTION_LENGTH_OF_MANY if many and not on_cpu else ATTENTION_LENGTH
    return ShapeTable(table, micro_batch_tokens, as_long)


def _ladder(first: int, last: int, ratio: float) -> set[int]:
    """Return lengths from `first` to `last`, in equal rounded steps of at most `ratio`."""
    first = min(first, last)
    steps = int(np.ceil(np.log(last / first) / np.log(ratio) - 1e-6)) if last > first else 0
    exact = [first * (last / first) ** (step / steps) for step in range(steps + 1)] if steps else [last]
    return {-(-int(np.ceil(length - 1e-6)) // ROW_MULTIPLE_OF) * ROW_MULTIPLE_OF for length in exact}


@dataclass(frozen=True)
class Segment:
    """The place of a datum in a row."""

    datum: int
    offset: int
    length: int


@dataclass
class Row:
    """A row of `length` tokens, with datums of one group."""

    length: int
    group: int
    segments: list[Segment] = field(default_factory=list)

    @property
    def used(self) -> int:
        return sum(segment.length for segment in self.segments)


@dataclass(frozen=True)
class MicroBatch:
    """Up to `num_rows` rows of `length` tokens; the missing ones are padding."""

    length: int
    num_rows: int
    rows: tuple[Row, ...]

    @property
    def groups(self) -> tuple[int, ...]:
        """The groups that have rows here, in order of first appearance."""
        return tuple(dict.fromkeys(row.group for row in self.rows))

    @property
    def num_tokens(self) -> int:
        """The tokens that the program computes, including padding."""
        return self.length * self.num_rows

    def positions(self) -> tuple[np.ndarray, np.ndarray]:
        """Return `position` and `start` int32[B, T]: each token's place in its datum, and the first key it
        may see.

        Every padding token is a sequence of its own.
        """
        position = np.zeros((self.num_rows, self.length), np.int32)
        start = np.tile(np.arange(self.length, dtype=np.int32), (self.num_rows, 1))
        for at, row in enumerate(self.rows):
            for s in row.segments:
                position[at, s.offset : s.offset + s.length] = np.arange(s.length)
                start[at, s.offset : s.offset + s.length] = s.offset
        return position, start

    def lay(self, values: Sequence[np.ndarray], trailing: tuple[int, ...], dtype: type) -> np.ndarray:
        """Return [B, T, *trailing]: `values[datum]` [N, <= trailing] (or empty) in each datum's place, else
        zero."""
        out = np.zeros((self.num_rows, self.length, *trailing), dtype)
        for at, row in enumerate(self.rows):
            for s in row.segments:
                value = values[s.datum]
                if not value.size:
                    continue
                corner: Any = tuple(slice(size) for size in value.shape[1:])
                out[(at, slice(s.offset, s.offset + s.length), *corner)] = value
        return out

    def pick(self, array: np.ndarray) -> dict[int, np.ndarray]:
        """Return each datum's part of `array` [B, T, ...], the inverse of `lay`."""
        return {
            s.datum: array[at, s.offset : s.offset + s.length]
            for at, row in enumerate(self.rows)
            for s in row.segments
        }


def pack(
    lengths: Sequence[int], groups: Sequence[int], table: ShapeTable, max_groups: int = 8
) -> list[MicroBatch]:
    """Put every datum, by its index, into exactly one row of its group; return micro-batches in no particular
    order.

    Best-fit decreasing: the longest datum first, into the fullest row that still has room. If several row
    lengths could be opened for a datum, all are tried and the cheapest packing wins. A micro-batch holds rows
    of at most `max_groups` groups.

    Raises ValueError for a datum that is empty or longer than the table's longest row.
    """
    if lengths and not 0 < min(lengths) <= max(lengths) <= table.max_length:
        raise ValueError(f"datum lengths must be 1 to {table.max_length}")
    openings = [length for length in table.rows if length <= table.micro_batch_tokens] or [min(table.rows)]
    packings = [
        _micro_batches(_rows(lengths, groups, table, opening), table, max_groups) for opening in openings
    ]
    return min(packings, key=lambda packing: sum(table.cost(m.length, m.num_rows) for m in packing))


def computed_tokens(packing: Sequence[MicroBatch]) -> int:
    """Return the tokens that the programs compute, including padding."""
    return sum(m.num_tokens for m in packing)


def _rows(lengths: Sequence[int], groups: Sequence[int], table: ShapeTable, opening: int) -> list[Row]:
    rows: list[Row] = []
    room: dict[int, list[tuple[int, int]]] = {}  # group -> (free tokens, row), ascending
    for datum in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length, group = lengths[datum], groups[datum]
        free = room.setdefault(group, [])
        at = bisect_left(free, (length, -1))
        if at < len(free):
            left, index = free.pop(at)
        else:
            left, index = max(opening, table.smallest_row(length)), len(rows)
            rows.append(Row(left, group))
        row = rows[index]
        row.segments.append(Segment(datum, row.length - left, length))
        if left > length:
            insort(free, (left - length, index))
    for row in rows:
        row.length = table.smallest_row(row.used)
    return rows


def _micro_batches(rows: list[Row], table: ShapeTable, max_groups: int) -> list[MicroBatch]:
    batches: list[MicroBatch] = []
    for length, counts in table.rows.items():
        of_length = sorted((row for row in rows if row.length == length), key=lambda row: row.group)
        while of_length:
            size = _first_batch(len(of_length), counts, length, table.micro_batch_tokens)
            taken, seen = [], set()
            for row in of_length[:size]:
                seen.add(row.group)
                if len(seen) > max_groups:
                    break
                taken.append(row)
            of_length = of_length[len(taken) :]
            batches.append(MicroBatch(length, size, tuple(taken)))
    return batches


def _first_batch(rows: int, counts: tuple[int, ...], length: int, micro_batch_tokens: int) -> int:
    """Return the number of rows in the first micro-batch of the cheapest way to run `rows` rows of
    `length`."""
    dispatch = micro_batch_tokens / 32 / length

    @cache
    def cheapest(left: int) -> tuple[float, int]:
        if left <= 0:
            return 0.0, 0
        return min((count + dispatch + cheapest(left - count)[0], count) for count in counts)

    if rows > 4 * counts[-1]:
        return counts[-1]
    return max(
        count for count in counts if count + dispatch + cheapest(rows - count)[0] <= cheapest(rows)[0] + 1e-9
    )
