"""Every wrong input is named: the datum, the field, and what would be right."""

import numpy as np
import pytest
from engine_training import datum, random_data, tensor
from tinsmith.engine.errors import UserError
from tinsmith.engine.messages import AdamParams, Datum, Tensor
from tinsmith.engine.training.validation import check_data, check_loss, check_optimizer

VOCAB, LONGEST = 320, 32


def check(data, loss="cross_entropy"):
    return check_data(data, check_loss(loss, {}), VOCAB, LONGEST)


def with_input(name, value, loss="cross_entropy"):
    """Two good datums, and the second's input `name` replaced (None: left out)."""
    data = random_data([5, 8], loss=loss)
    data[1].inputs.pop(name, None)
    if value is not None:
        data[1].inputs[name] = value if isinstance(value, Tensor) else tensor(value)
    return data


def targets(*values):
    return np.array(values or range(8), np.int64)


WRONG = [
    ([], "data is empty"),
    ([datum([])], "datum 0: model_input is empty"),
    (random_data([4, 33]), "datum 1: model_input has 33 tokens; this model takes at most 32"),
    (
        [datum([1, 320], target_tokens=[1, 2])],
        "datum 0: model_input has token 320 at position 1; .* to 319",
    ),
    ([datum([-1], target_tokens=[1])], "datum 0: model_input has token -1"),
    (
        with_input("weights", None),
        "datum 1: .* no 'weights'; .* needs target_tokens, weights",
    ),
    (with_input("target_tokens", None), "datum 1: loss_fn_inputs has no 'target_tokens'"),
    (with_input("target_tokens", targets(1, 2)), r"datum 1: .*target_tokens.* shape \[2\]; .* 8 tokens"),
    (
        with_input("target_tokens", targets(*range(7), 320)),
        "datum 1: .*target_tokens.* 320 at position 7",
    ),
    (
        with_input("target_tokens", targets(*range(7), -5)),
        "datum 1: .*target_tokens.* -5 at position 7",
    ),
    (
        with_input("target_tokens", targets(*range(7), 2**40)),
        "datum 1: .* token 1099511627776",
    ),
    (with_input("target_tokens", np.zeros(8, np.float32)), "target_tokens.* float32; it must be int64"),
    (with_input("target_tokens", np.zeros((8, 0), np.int64)), "0 targets per token"),
    (with_input("target_tokens", np.zeros((8, 1, 1), np.int64)), r"shape \[8, 1, 1\]"),
    (with_input("weights", np.ones(7, np.float32)), r"datum 1: .*weights.* shape \[7\]; it must be \[8\]"),
    (with_input("weights", np.ones((8, 2), np.float32)), r"weights.* shape \[8, 2\]; it must be \[8\]"),
    (with_input("weights", np.ones(8, np.int64)), "weights.* dtype int64; it must be float32"),
    (
        with_input("weights", np.array([1] * 7 + [np.nan], np.float32)),
        r"datum 1: .* nan at position \[7\]",
    ),
    (with_input("weights", np.array([np.inf] * 8, np.float32)), "weights.* inf .*finite"),
    (with_input("weights", Tensor("float32", (8,), b"1234")), "weights.* holds 4 bytes; .* needs 32"),
    (with_input("clip_low_threshold", np.ones(8, np.float32)), "clip_low_threshold.* loss_fn_config"),
    ([Datum(b"12345", {})], "datum 0: model_input .* 5 bytes"),
]


@pytest.mark.parametrize(("data", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_data(data, message):
    with pytest.raises(UserError, match=message):
        check(data)


@pytest.mark.parametrize("name", ["logprobs", "advantages", "sequence_ratio_mask", "target_tokens"])
def test_a_missing_input_of_gspo(name):
    with pytest.raises(UserError, match=f"datum 1: loss_fn_inputs has no '{name}'; loss 'gspo' needs"):
        check(with_input(name, None, "gspo"), "gspo")


def test_one_target_per_token_for_policy_losses():
    data = with_input("target_tokens", np.zeros((8, 2), np.int64), "ppo")
    with pytest.raises(UserError, match=r"datum 1: .*'ppo' takes one target per token"):
        check(data, "ppo")


def test_good_data_is_decoded():
    checked = check(
        [datum([1, 2], target_tokens=[[2, 3], [4, 5]], weights=np.ones((2, 2), np.float32), note=[1, 2])]
    )
    assert checked[0].targets.dtype == np.int32
    assert checked[0].targets.tolist() == [[2, 3], [4, 5]]
    assert checked[0].shape == (2, 2)
    assert set(checked[0].inputs) == {"weights"}
    assert check(random_data([3]))[0].targets.shape == (3, 1)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("ppa", {}, "unknown loss_fn 'ppa'; known: cross_entropy, "),
        ("ppo", {"clip_low": 0.8}, "unknown key 'clip_low' for loss 'ppo'; it takes: clip_low_threshold"),
        ("cross_entropy", {"beta": 0.8}, "it takes: none"),
        ("dro", {"beta": float("nan")}, r"loss_fn_config\['beta'\] is nan"),
        ("ppo", {"clip_low_threshold": 2.0}, "clip_low_threshold 2.0 is above clip_high_threshold 1.2"),
        ("policy_loss", {"eps_clip_c": 0.5}, "eps_clip_c is 0.5; it must be over 1"),
        ("policy_loss", {"use_tis": 0.5}, r"\['use_tis'\] is 0.5; it must be true or false"),
        ("policy_loss", {"eps_clip": True}, "it must be a finite number"),
        ("drgrpo", {"kl_type": "k4"}, "is 'k4'; it must be one of: k1, k2, k3"),
        ("drgrpo", {"ratio_type": "word"}, "is 'word'; it must be one of: token, sequence"),
        ("causallm_loss", {"logprob_temperature": 2.0}, "unknown key 'logprob_temperature'"),
    ],
)
def test_wrong_loss(name, config, message):
    with pytest.raises(UserError, match=message):
        check_loss(name, config)


def test_config_fills_in_the_defaults():
    assert check_loss("ppo", {"clip_high_threshold": 2}).config == (0.8, 2.0)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"beta2": 1.0}, "beta2"),
        ({"beta2": 0.99999999999}, "beta2 is 0.99999999999; it must be below 1, also when rounded"),
        ({"weight_decay": 1e39}, "weight_decay is 1e.39; it must be at most 3.4"),
        ({"grad_clip_norm": float("inf")}, "grad_clip_norm"),
    ],
)
def test_wrong_adam(params, field):
    with pytest.raises(UserError, match=f"adam_params.{field}"):
        check_optimizer(AdamParams(**params))


EXPERTS = np.arange(8 * 6).reshape(8, 6) % 5  # 3 of 5 experts in each of 2 layers


@pytest.mark.parametrize(
    ("given", "routing", "reason"),
    [
        (EXPERTS, None, "this model has no experts; leave it out"),
        (EXPERTS.astype(np.float32), (2, 3, 5), "has dtype float32; it must be int64"),
        (EXPERTS[:, :5], (2, 3, 5), r"has shape \[8, 5\]; it must be \[8, 6\]: for each token 3 experts"),
        (np.full((8, 6), 5), (2, 3, 5), r"has \[5, 5, 5\] for token 0 in layer 0 .* from 0 to 4, or all -1"),
        (np.full((8, 6), 4), (2, 3, 5), r"has \[4, 4, 4\] for token 0"),
        (np.where(EXPERTS == 4, -1, EXPERTS), (2, 3, 5), r"for token 0 in layer 1 "),
    ],
)
def test_given_experts_that_the_model_cannot_use_are_refused(given, routing, reason):
    data = with_input("routed_experts", given)
    with pytest.raises(UserError, match=rf"datum 1: loss_fn_inputs\['routed_experts'\].*{reason}"):
        check_data(data, check_loss("cross_entropy", {}), VOCAB, LONGEST, routing)


def test_given_experts_are_laid_out_by_token_layer_and_choice():
    given = np.where(np.arange(6) < 3, EXPERTS, -1)
    data = with_input("routed_experts", given)
    _, found = check_data(data, check_loss("cross_entropy", {}), VOCAB, LONGEST, (2, 3, 5))
    np.testing.assert_array_equal(found.experts, given.reshape(8, 2, 3))
