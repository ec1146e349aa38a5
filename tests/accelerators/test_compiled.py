"""Our programs as the compilers of GPUs and TPUs make them, on small shapes. No device is needed.

Memory, collectives and kernels are facts of the compiled programs. Nothing runs, so nothing here says that
the numbers are right: that is `tests/model/test_attention.py`, and on a device `make gpu`.
"""

from __future__ import annotations

import pytest

from .laboratory_process import compiled

D, F, V, L, T = 512, 1280, 4096, 4, 1536  # laboratory's "tiny"
LAYER_MATRICES = {(D, 1024): 2, (D, 512): 2, (D, F): 3}
"""The shapes of a layer's matrices, in either order, and how many there are: q, o; k, v; gate, up, down."""
RANK = 32
ADAPTER_OF_LAYER = RANK * sum(number * sum(dims) for dims, number in LAYER_MATRICES.items())
ADAPTER_OF_HEAD = RANK * (D + V)
MIB = 2**20

FSDP, TENSOR, BOTH = "step:fsdp=4,rows=4", "step:tensor=4", "step:fsdp=2,tensor=2,rows=2"
OPTIMIZER, ALL_WEIGHTS = "optimizer:fsdp=2,tensor=2", "optimizer:full=1,fsdp=2,tensor=2"
ATTENTION, WINDOWED = "attention", "attention:window=256,sinks=1"
CASES = {
    "h200": (ATTENTION, WINDOWED, "step", "step:remat=dots"),
    "h200x8": (FSDP, TENSOR, OPTIMIZER, ALL_WEIGHTS),
    "v5p-8": (ATTENTION, BOTH, OPTIMIZER),
    "v5e-4": (WINDOWED, BOTH, OPTIMIZER),
    "v6e-4": (WINDOWED, BOTH, OPTIMIZER),
}


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


def test_with_fsdp_no_stack_of_weights_is_laid_out_anew():
    """Such a copy is a transposed stack of shards, in which the layers do not come first."""
    cut = {tuple(sorted((L, i // n, o // m))) for i, o in LAYER_MATRICES for n, m in ((4, 1), (1, 4))}
    buffers = compiled("h200x8", FSDP).buffers
    assert not [dims for _, dims in buffers if tuple(sorted(dims)) in cut and dims[0] != L]


def test_with_fsdp_gradients_of_adapters_are_summed_once():
    """A layer's are summed in the backward of the layer, and the head's after the loop over chunks of
    tokens."""
    of_layers = L * ADAPTER_OF_LAYER
    summed = compiled("h200x8", FSDP).moved("all-reduce", "f32")
    assert of_layers + ADAPTER_OF_HEAD <= summed < 1.01 * (of_layers + 2 * ADAPTER_OF_HEAD)


def test_with_tensor_no_adapter_and_no_gradient_of_one_is_gathered():
    assert compiled("h200x8", TENSOR).moved("all-gather", "f32") < 0.01 * ADAPTER_OF_LAYER


def test_adapters_of_one_input_are_one_product():
    """XLA joins the products with A of q, k and v, and those with A of gate and up."""
    widths = {dims[-1] for _, dims in compiled("h200", "step").buffers if len(dims) == 2 and dims[0] == T}
    assert {3 * RANK, 2 * RANK} <= {width % 128 for width in widths}


@pytest.mark.parametrize("target", ["h200x8", "v5e-4", "v5p-8", "v6e-4"])
def test_the_optimizer_moves_nothing_but_norms_and_keeps_no_second_copy(target):
    """Weights, moments and gradients are updated where they lie: their own memory, and one update's."""
    found = compiled(target, OPTIMIZER)
    assert found.moved("all-gather", "f32") == 0
    assert found.moved("all-reduce", "f32") < 100
    assert found.temporaries < found.arguments


def test_the_optimizer_of_all_weights_gathers_none():
    found = compiled("h200x8", ALL_WEIGHTS)
    assert found.moved("all-gather", "f32") == 0
    assert found.temporaries < found.arguments / 2


def test_with_tensor_no_weight_of_the_base_is_gathered():
    found = compiled("h200x8", TENSOR)
    for dims in (*LAYER_MATRICES, (V, D)):
        assert found.gathers(*dims) == 0, dims


@pytest.mark.parametrize("target", ["v5e-4", "v5p-8", "v6e-4"])
def test_on_a_tpu_weights_are_gathered_over_fsdp_alone_and_the_head_once(target):
    """Each matrix of a layer forward and backward. The compilers may make rings of permutes of a gather."""
    found = compiled(target, BOTH)
    for (into, out), number in LAYER_MATRICES.items():
        if out != D:  # half a q is as large as a whole k
            assert found.gathers(into, out) == 0, (into, out)
        assert found.gathers(into, out // 2) <= 2 * number * L, (into, out)
    assert found.gathers(V, D) == 0
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
