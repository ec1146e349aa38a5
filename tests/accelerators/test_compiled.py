"""What the compilers of GPUs and TPUs make of our programs, on small shapes. No device is needed.

Memory, collectives and kernels are facts of the compiled programs. Nothing runs, so nothing here says that
the numbers are right: that is `tests/model/test_attention.py`, and on a device `make gpu`.
"""

from __future__ import annotations

import pytest

from .laboratory_process import Compiled, compile_for

D, F, V, L, T = 512, 1280, 4096, 4, 1536  # laboratory's "tiny"
LAYER_MATRICES = {(D, 1024): 2, (D, 512): 2, (D, F): 3}
"""The shapes of a layer's matrices, in either order, and how many there are: q, o; k, v; gate, up, down."""
MIB = 2**20

FSDP, TENSOR, BOTH = "step:fsdp=4,rows=4", "step:tensor=4", "step:fsdp=2,tensor=2,rows=2"
ATTENTION, WINDOWED = "attention", "attention:window=256,sinks=1"
CASES = {
    "h200": (ATTENTION, WINDOWED, "step", "step:remat=dots"),
    "h200x8": (FSDP, TENSOR),
    "v5p-8": (ATTENTION, BOTH),
    "v5e-4": (WINDOWED,),
    "v6e-4": (WINDOWED,),
}
_found: dict[str, dict[str, Compiled]] = {}


def compiled(target: str, case: str) -> Compiled:
    if target not in _found:
        _found[target] = compile_for(target, *CASES[target])
    return _found[target][case]


STEPS = [(target, case) for target, cases in CASES.items() for case in cases if case.startswith("step")]
ATTENTIONS = [
    (target, case) for target, cases in CASES.items() for case in cases if case.startswith("attention")
]


@pytest.mark.parametrize(("target", "case"), ATTENTIONS)
def test_attention_needs_no_memory_that_grows_with_the_square_of_a_row(target, case):
    found = compiled(target, case)
    assert not [dims for _, dims in found.buffers if dims.count(8192) >= 2]
    if target == "h200":
        assert found.calls["mosaic_gpu_v2"] == 3  # the forward once, and two kernels backward
        assert found.temporaries < 16 * MIB
    else:
        assert found.calls["tpu_custom_call"] == 3
        assert found.temporaries < 512 * MIB  # the kernel's log-sum-exp takes 128 lanes of each query


@pytest.mark.parametrize(("target", "case"), STEPS)
def test_a_step_has_no_square_buffer_and_no_float32_product_in_the_trunk(target, case):
    found = compiled(target, case)
    assert not [dims for _, dims in found.buffers if dims.count(T) >= 2]
    # What is left in float32 is the head's adapter, in a few products with its rank.
    assert found.products.get("f32", 0) < 0.01 * found.products["bf16"]


@pytest.mark.parametrize("target", ["h200x8"])
def test_with_fsdp_each_weight_is_gathered_twice_and_the_head_once(target):
    """Forward and backward; the head's forward and backward are one pass. The embedding is not gathered."""
    found = compiled(target, FSDP)
    for dims, number in LAYER_MATRICES.items():
        assert found.gathers(*dims) == 2 * number * L, dims
    assert found.gathers(V, D) == 1


def test_with_tensor_no_weight_of_the_base_is_gathered():
    found = compiled("h200x8", TENSOR)
    for dims in (*LAYER_MATRICES, (V, D)):
        assert found.gathers(*dims) == 0, dims


def test_on_a_tpu_weights_are_gathered_over_fsdp_alone_and_the_head_once():
    """The counts are upper bounds: an asynchronous gather may be written in several fusions."""
    found = compiled("v5p-8", BOTH)
    for (into, out), number in LAYER_MATRICES.items():
        assert 0 < found.gathers(into, out // 2) <= 3 * number * L, (into, out)
    assert found.gathers(V // 2, D) <= 1


def test_dots_runs_no_product_of_the_trunk_again():
    full, dots = compiled("h200", "step"), compiled("h200", "step:remat=dots")
    matrices = L * (2 * D * 1024 + 2 * D * 512 + 3 * D * F)
    useful = 4 * T * (matrices + D * V)
    assert dots.products["bf16"] < 1.1 * useful + 8 * T * 32 * L * 10_000
    assert full.products["bf16"] > dots.products["bf16"] + 1.5 * T * matrices
    assert full.calls["mosaic_gpu_v2"] == 4 * L  # "full" runs attention's forward again,
    assert dots.calls["mosaic_gpu_v2"] == 3 * L  # "dots" has saved it


def test_the_temporaries_of_a_small_step_are_bounded():
    """The layers' inputs, a few buffers [T, F], and the logits of one chunk in float32 and bfloat16."""
    inputs, mlp, logits = L * T * D * 2, 8 * T * F * 2, 1024 * V * 10
    assert compiled("h200", "step").temporaries < 1.5 * (inputs + mlp + logits) + 32 * MIB
