"""Packing: every token once, in few shapes, with little padding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinsmith.engine.training.packing import computed_tokens, pack, shape_table

TABLES = [
    shape_table(512, 1024),
    shape_table(8192, 1024),
    shape_table(8192, 8192),
    shape_table(64, 1024),
    shape_table(2048, 4 * 8192, row_multiple=4),
    shape_table(100, 1024, row_multiple=8),
    shape_table(131072, 8192),
]


@st.composite
def batches(draw):
    table = draw(st.sampled_from(TABLES))
    longest = min(table.max_length, 3000)
    lengths = draw(st.lists(st.integers(1, longest) | st.integers(1, 40), min_size=1, max_size=60))
    groups = draw(st.lists(st.integers(0, 11), min_size=len(lengths), max_size=len(lengths)))
    return table, lengths, groups


@settings(max_examples=150, deadline=None)
@given(batches())
def test_every_token_lies_in_one_place_of_a_row_of_its_group(batch):
    table, lengths, groups = batch
    packing = pack(lengths, groups, table)
    seen = []
    for micro_batch in packing:
        assert (micro_batch.length, micro_batch.num_rows) in table.shapes
        assert 0 < len(micro_batch.rows) <= micro_batch.num_rows
        assert len(micro_batch.groups) <= 8
        for row in micro_batch.rows:
            taken = np.zeros(micro_batch.length, int)
            for segment in row.segments:
                assert groups[segment.datum] == row.group
                assert segment.length == lengths[segment.datum]
                taken[segment.offset : segment.offset + segment.length] += 1
                assert segment.offset + segment.length <= micro_batch.length
                seen.append(segment.datum)
            assert taken.max() == 1
    assert sorted(seen) == list(range(len(lengths)))


@settings(max_examples=60, deadline=None)
@given(batches())
def test_packed_values_come_back_in_the_clients_order(batch):
    table, lengths, groups = batch
    values, begin = [], 1
    for length in lengths:
        values.append(np.arange(begin, begin + length))
        begin += length
    found = {}
    for micro_batch in pack(lengths, groups, table):
        laid = micro_batch.lay(values, (), np.int64)
        position, start = micro_batch.positions()
        index = np.arange(micro_batch.length)
        assert (start <= index).all()
        real = laid > 0
        # padding sees itself alone; a token sees its datum from the beginning, and nothing before
        assert (start[~real] == np.broadcast_to(index, laid.shape)[~real]).all()
        assert (position[real] == (index - start)[real]).all()
        first = np.take_along_axis(laid, start, axis=1)
        assert (laid - first == position)[real].all()
        found |= micro_batch.pick(laid)
    for datum, value in enumerate(values):
        np.testing.assert_array_equal(found[datum], value)


@pytest.mark.parametrize("table", [shape_table(512, 1024), shape_table(8192, 1024)])
def test_little_padding_on_mixed_lengths(table):
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(200):
        lengths = rng.integers(64, 513, 16).tolist()
        ratios.append(computed_tokens(pack(lengths, [0] * 16, table)) / sum(lengths))
    assert max(ratios) <= 1.3
    assert np.mean(ratios) <= 1.12


def test_few_shapes_whatever_the_lengths():
    rng = np.random.default_rng(0)
    for table, most in (
        (shape_table(512, 1024), 6),
        (shape_table(8192, 1024), 6),
        (shape_table(8192, 8192), 6),
    ):
        used = set()
        for _ in range(100):
            lengths = rng.integers(1, table.max_length + 1, rng.integers(1, 40)).tolist()
            used |= {(m.length, m.num_rows) for m in pack(lengths, [0] * len(lengths), table)}
        assert len(used) <= most


@pytest.mark.parametrize("lengths", [[0], [5, 513]])
def test_a_datum_that_fits_no_row_is_refused(lengths):
    with pytest.raises(ValueError, match="1 to 512"):
        pack(lengths, [0] * len(lengths), shape_table(512, 1024))
