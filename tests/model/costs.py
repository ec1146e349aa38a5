"""Counts what the operations of a program cost, whatever else the machine does."""

from collections.abc import Iterator

import jax
import numpy as np


def costs(jaxpr, times: int = 1) -> Iterator[tuple[int, int]]:
    """Yield the multiplications of products, and the numbers written, of every operation."""
    for equation in jaxpr.eqns:
        written = sum(each.aval.size for each in equation.outvars)
        multiplied = 0
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            multiplied = written * int(np.prod([shape[axis] for axis in contracted]))
        yield times * multiplied, times * written
        inner_times = times * equation.params.get("length", 1)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from costs(inner, inner_times)


def cost(function, *arguments) -> np.ndarray:
    """Return the sums of `costs` of a function."""
    return np.array(list(costs(jax.make_jaxpr(function)(*arguments).jaxpr))).sum(0)
