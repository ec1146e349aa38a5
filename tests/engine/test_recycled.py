"""Recycled trees: reused by their structure, within a number of bytes."""

import jax.numpy as jnp
from tinsmith.engine.budget import Budget
from tinsmith.engine.training.recycled import RecycledTrees


def tree(kib: int):
    return {"a": jnp.zeros(kib * 128), "b": jnp.zeros(kib * 128)}


def test_the_least_recently_used_make_way_and_what_is_left_is_bounded():
    kept = RecycledTrees(Budget(10 << 10))
    small, large = [tree(2), tree(2)], tree(4)
    kept.put("small", small[0])
    kept.put("large", large)
    kept.put("small", small[1])
    assert kept.bytes == 8 << 10
    kept.put("small", tree(4))  # over the limit: the large one was used before these
    assert kept.bytes == 8 << 10
    assert kept.take("large") is None
    kept.put("huge", tree(64))
    assert kept.bytes <= 10 << 10
    assert kept.take("huge") is None


def test_a_tree_is_given_out_once():
    kept = RecycledTrees(Budget(1 << 20))
    one = tree(1)
    kept.put("s", one)
    assert kept.take("s") is one
    assert kept.take("s") is None
    assert kept.bytes == 0
