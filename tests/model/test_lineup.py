"""Adapters of the official registry's models have as many parameters as tinker-cookbook publishes."""

import pytest

from tests.model import lineup


@pytest.mark.parametrize("name", lineup.SIZES)
def test_adapters_have_the_published_numbers_of_parameters(name):
    ours, published = (
        dict(zip(lineup.PARTS, counts, strict=True))
        for counts in (lineup.counted(name), lineup.PUBLISHED[name])
    )
    assert ours == published | lineup.OTHER_COUNTS.get(name, {})


def test_the_documented_table_is_this_one():
    assert len(lineup.PUBLISHED) == 46
    assert lineup.PAGE.read_text() == lineup.page(), "run python tests/model/lineup.py"
