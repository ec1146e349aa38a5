"""Fuzz campaigns: many cases from one seed, each with bounds on its time and its memory.

The test command runs a few hundred cases per decoder, always the same ones. `make fuzz CASES=1000000` shares
that many among all decoders, new ones every time.
"""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("TINSMITH_FUZZ_CASES", 0))  # over all decoders; 0: the test command's
SEED = os.environ.get("TINSMITH_FUZZ_SEED")  # run this example again, and no other
CASES_IN_THE_TEST_COMMAND = 300  # per decoder
DECODERS = 8  # campaigns in this folder
BATCH = 100  # cases from one seed: hypothesis costs as much per example as a hundred cases
SHARDS = 25 if CASES else 1  # parts of a long campaign, so that its progress is seen
MAX_CASE_SECONDS = 3.0  # of this process's computing, not of the clock
MAX_GROWTH_BYTES = 2 << 30  # of the most memory that the process ever had; dense tensors may have 1 GiB

T = TypeVar("T")
Case = TypeVar("Case")


def campaign(make: Callable[[random.Random], Case]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Calls the decorated property with cases of `make`; a failure shows the seed and the case.

    The property's other arguments are fixtures.
    """

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        total = max(BATCH, CASES // DECODERS) if CASES else CASES_IN_THE_TEST_COMMAND
        examples = max(1, -(-total // (SHARDS * BATCH)))

        @pytest.mark.parametrize("shard", range(SHARDS))
        @pytest.mark.filterwarnings("ignore")  # they quote cases, which pytest-xdist cannot always carry
        def test(shard: int, request: pytest.FixtureRequest, record_property: Any) -> None:
            arguments = {name: request.getfixturevalue(name) for name in fixtures}
            count = 0

            def batch(seed: int) -> None:
                nonlocal count
                rng = random.Random(seed)
                for number in range(BATCH):
                    _one(make(rng), check, arguments, f"TINSMITH_FUZZ_SEED={seed}, case {number}")
                    count += 1

            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if SEED is not None:
                batch(int(SEED))
            else:
                _given(batch, examples)
            record_property("fuzz_cases", count)
            growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
            assert growth < MAX_GROWTH_BYTES, f"the process grew by {growth >> 20} MiB"

        names = check.__code__.co_varnames[: check.__code__.co_argcount]
        fixtures = names[1:]
        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


def _given(batch: Callable[[int], None], examples: int) -> None:
    profile = settings(
        max_examples=examples,
        derandomize=not CASES,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # a smaller seed is no simpler case
        suppress_health_check=list(HealthCheck),
    )
    profile(given(st.integers(0, (1 << 64) - 1))(batch))()


def _one(case: Any, check: Callable[..., None], arguments: dict[str, Any], where: str) -> None:
    began = time.process_time()
    try:
        check(case, **arguments)
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {str(error)!a}\n{_shown(case)}") from error
    seconds = time.process_time() - began
    assert seconds < MAX_CASE_SECONDS, f"{where}: {seconds:.1f} s\n{_shown(case)}"


def _shown(case: Any) -> str:
    text = repr(case)
    return text if len(text) <= 4000 else f"{text[:4000]}... ({len(text)} characters)"
