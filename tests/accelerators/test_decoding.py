"""The sampler's programs as the compilers of GPUs and TPUs make them, on small shapes. No device is needed.

Nothing runs here. That the numbers are right: tests/model/test_paged_attention.py and
tests/engine/test_sampler_backends.py.
"""

from __future__ import annotations

import pytest

from .laboratory_process import compiled

D, F, V, L, K, H = 512, 1280, 4096, 4, 4, 128  # laboratory's "tiny"
LAYER_MATRICES = {(D, 1024): 2, (D, 512): 2, (D, F): 3}
"""The shapes of a layer's matrices, in either order, and how many there are: q, o; k, v; gate, up, down."""
MATRICES = [*LAYER_MATRICES, (V, D)]
SLOTS, CONTEXT = 64, 2048
PAGES = 2 * L * SLOTS * CONTEXT * K * H * 2  # bytes
MIB = 2**20

PLAIN, ADAPTERS = "decode", "decode:adapters=4,filtered=1"
PROMPT, CONTINUED = "prefill", "prefill:context=2048"
FSDP, BOTH = "decode:fsdp=4", "decode:fsdp=2,tensor=2"
PROMPT_FSDP = "prefill:fsdp=4,tokens=1536"  # as many as no matrix has rows or columns
CASES = {
    "h200": (PLAIN, ADAPTERS, CONTINUED),
    "h200x8": (FSDP, BOTH, PROMPT_FSDP),
    "v5e-4": (PLAIN, PROMPT),
    "v5p-8": (FSDP, PROMPT_FSDP),
    "v6e-4": (PLAIN, PROMPT),
}


ALL = [(target, case) for target, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("target", "case"), ALL)
def test_neither_pages_nor_weights_are_copied(target, case):
    """The temporaries are logits, activations, and a layer's weights at most."""
    found = compiled(target, case)
    assert found.arguments > PAGES / 8
    assert found.temporaries < 32 * MIB


@pytest.mark.parametrize("target", ["h200", "v5e-4", "v6e-4"])
def test_attention_has_a_kernel_that_reads_pages(target):
    kernel = "__gpu$xla.gpu.triton" if target == "h200" else "tpu_custom_call"
    assert compiled(target, PLAIN).calls[kernel] == 16 * L  # for each token and layer


@pytest.mark.parametrize(("target", "case"), [("h200x8", FSDP), ("h200x8", BOTH), ("v5p-8", FSDP)])
def test_under_a_mesh_no_weight_is_gathered(target, case):
    found = compiled(target, case)
    for dims in MATRICES:
        for ways in (1, 2, 4):
            assert found.gathers(dims[0] // ways, dims[1]) == 0, dims
            assert found.gathers(dims[0], dims[1] // ways) == 0, dims


@pytest.mark.parametrize("target", ["h200x8", "v5p-8"])
def test_prompts_gather_each_weight_once(target):
    """Some gathers may be rings of permutes. Neither the head nor the whole embedding is needed."""
    found = compiled(target, PROMPT_FSDP)
    for dims, number in LAYER_MATRICES.items():
        assert found.gathers(*dims) <= number * L, dims
    assert found.gathers(V, D) == 0


def test_heads_of_the_cache_are_cut_over_fsdp():
    whole, cut = compiled("h200", PLAIN), compiled("h200x8", FSDP)
    assert cut.arguments < whole.arguments / 3.5


def test_each_adapter_is_read_once():
    """No row gathers an adapter of its own."""
    found = compiled("h200", ADAPTERS)
    assert not [dims for _, dims in found.buffers if {SLOTS, D, 32} <= set(dims)]
