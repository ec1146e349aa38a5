"""Layers as groups of repeated patterns, and what follows from them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinsmith.model.config import Attention, GatedMlp, Layer, Rope, fold
from tinsmith.model.families import FAMILIES


def layer(window: int | None) -> Layer:
    return Layer(Attention(32, 4, 2, 8, Rope(1e4, 8), window), GatedMlp(32, 64))


A, B, C = layer(None), layer(4), layer(8)


@given(st.lists(st.sampled_from([A, B, C]), min_size=1, max_size=40))
def test_groups_repeat_to_the_list_that_was_folded(layers):
    assert [each for group in fold(layers) for each in group.pattern * group.repeats] == layers


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        ([A] * 30, [(1, 30)]),
        ([B, A] * 12, [(2, 12)]),
        ([B, B, B, B, B, A] * 4 + [B, B], [(6, 4), (1, 2)]),
        ([A] * 3 + [B] * 58, [(1, 3), (1, 58)]),
        ([A, A, A, B] * 2, [(4, 2)]),
        ([A, B, C], [(1, 1), (1, 1), (1, 1)]),
    ],
)
def test_known_patterns(layers, groups):
    assert [(len(group.pattern), group.repeats) for group in fold(layers)] == groups


def test_every_layer_has_one_place():
    hf = {"model_type": "qwen3", "num_hidden_layers": 7, "use_sliding_window": True, "sliding_window": 4}
    sliding, full = "sliding_attention", "full_attention"
    config = FAMILIES["qwen3"].read(hf | {"layer_types": [sliding, full, sliding, full, full, full, full]})
    assert [stack.layer.mixer.window for stack, _ in config.places] == [4, None, 4, None, None, None, None]
    assert [stack.layers[at] for stack, at in config.places] == list(range(7))
    assert len({stack.path("q_proj.weight") for stack in config.all_stacks}) == len(config.all_stacks) > 1


def test_a_decoder_with_equal_layers_has_one_stack_without_a_key():
    """Training states on disk have this tree."""
    (stack,) = FAMILIES["llama"].read({"model_type": "llama"}).all_stacks
    assert stack.path("q_proj.weight") == "layers.q_proj.weight"
