"""Mixtures whose experts are divided among devices, as the compilers of GPUs and TPUs make them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import pytest
from tinsmith.model.counts import SPARE_ROWS

from .laboratory_process import compiled

D, F, E, K, L, V, T = 512, 320, 32, 4, 4, 4096, 1536  # laboratory's "mixture"
WAYS = 4
EXPERT, FSDP = "step:model=mixture,expert=4,rows=4", "step:model=mixture,fsdp=4,rows=4"
TARGETS = ("h200x8", pytest.param("v5p-8", marks=pytest.mark.slow))


def of_experts(dims: Sequence[int]) -> bool:
    """Return whether an array has the hidden size and the width of experts, so that it is matrices of
    experts."""
    return D in dims and F in dims


@pytest.mark.parametrize("target", TARGETS)
def test_experts_stay_on_their_devices_and_tokens_travel(target):
    divided, gathered = compiled(target, EXPERT), compiled(target, FSDP)
    assert gathered.gathered(of_experts) >= 2 * 3 * L  # forward and backward
    assert divided.gathered(of_experts) == 0
    assert divided.gathers(WAYS, T, D) + divided.gathers(WAYS * T, D) >= 2 * L
    assert not [dims for _, dims in divided.buffers if E in dims and of_experts(dims)]


@pytest.mark.parametrize("target", TARGETS)
def test_no_buffer_has_a_token_for_every_expert(target):
    """The largest have each token once for each of its experts; on a GPU, only for a device's own share."""
    for case in (EXPERT, FSDP):
        largest = max(prod(dims) for _, dims in compiled(target, case).buffers)
        tokens = T * K * (WAYS if case == EXPERT else 1)
        assert largest <= max(tokens * D, 1024 * V, L * E * D * F // WAYS)
    if target == "h200x8":
        sorted_rows = [dims for _, dims in compiled(target, EXPERT).buffers if D in dims]
        assert max(map(prod, sorted_rows)) <= max(SPARE_ROWS * T * K * D, L * E * D * F // WAYS)
