"""Three layouts of a datum are one: against datums shifted by hand, one at a time."""

import numpy as np
import pytest
from engine_training import datum, lora, make_trainer, relative, run, with_random_b
from tinsmith.engine.errors import UserError
from tinsmith.engine.messages import AdamParams

TOKENS = np.array([5, 17, 3, 200, 41, 9, 77, 12], np.int64)
N = len(TOKENS)
RNG = np.random.default_rng(0)
Q = (-5.7 + 0.3 * RNG.normal(size=N)).astype(np.float32)
A = RNG.normal(size=N).astype(np.float32)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("model"))


def gradients_and_logprobs(trainer, data, loss, alignment="by_shape"):
    """The norm of the gradient of one model, and of each datum its log-probs."""
    state = with_random_b(trainer.create(lora(), target_alignment=alignment))
    output = run(trainer, state, data, loss)
    norm = trainer.optim_step(state, AdamParams(learning_rate=0.0))["grad_norm"]
    return norm, output.logprobs, output.metrics["valid_tokens:sum"]


def shifted(**inputs):
    """Position i predicts token i + 1; the last one predicts nothing that counts."""
    none = {"target_tokens": TOKENS, **inputs}
    return datum(TOKENS, **{name: np.append(values[1:], values[:1] * 0) for name, values in none.items()})


def same(got, want, rows, ignored=()):
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    assert got[2] == want[2]
    expected = want[1][0][rows].copy()
    expected[list(ignored)] = 0
    assert got[1][0].shape == expected.shape
    assert relative(got[1][0], expected) < 1e-6


def test_labels_are_about_the_tokens_themselves(trainer):
    labels = np.where(np.arange(N) < 3, -100, TOKENS)
    weights = (np.arange(N) >= 3).astype(np.float32)
    want = gradients_and_logprobs(trainer, [shifted(weights=weights)], "cross_entropy", "shifted")
    for loss in ("causallm_loss", "cross_entropy"):
        got = gradients_and_logprobs(trainer, [datum(TOKENS, labels=labels)], loss)
        same(got, want, slice(0, N - 1), ignored=(0, 1))
    # a policy loss whose inputs are about the tokens too
    want = gradients_and_logprobs(
        trainer, [shifted(logprobs=Q, advantages=A * weights)], "policy_loss", "shifted"
    )
    got = gradients_and_logprobs(
        trainer, [datum(TOKENS, labels=labels, old_logprobs=Q, advantages=A)], "policy_loss"
    )
    same(got, want, slice(0, N - 1), ignored=(0, 1))


def test_fewer_targets_are_about_the_last_tokens(trainer):
    k = 4
    tail = {"logprobs": Q[-k:], "advantages": A[-k:]}
    late = np.arange(N) >= N - k
    want = gradients_and_logprobs(
        trainer, [shifted(logprobs=Q, advantages=np.where(late, A, 0))], "ppo", "shifted"
    )
    got = gradients_and_logprobs(trainer, [datum(TOKENS, target_tokens=TOKENS[-k:], **tail)], "ppo")
    same(got, want, slice(N - k - 1, N - 1))
    masked = datum(TOKENS, target_tokens=TOKENS[-k:], mask=np.array([0, 1, 1, 0]), **tail)
    kept = late & ~np.isin(np.arange(N), (N - k, N - 1))
    want = gradients_and_logprobs(
        trainer, [shifted(logprobs=Q, advantages=np.where(kept, A, 0))], "ppo", "shifted"
    )
    same(gradients_and_logprobs(trainer, [masked], "ppo"), want, slice(N - k - 1, N - 1))


def test_shifted_targets_stay_as_they_are_and_may_be_none(trainer):
    targets = np.append(TOKENS[1:], -100)
    targets[2] = -100
    weights = np.array([1, 1, 0, 1, 1, 1, 1, 0], np.float32)
    want = gradients_and_logprobs(trainer, [shifted(weights=np.roll(weights, 1))], "cross_entropy", "shifted")
    got = gradients_and_logprobs(trainer, [datum(TOKENS, target_tokens=targets)], "causallm_loss")
    same(got, want, slice(0, N), ignored=(2, N - 1))
    assert got[2] == 6


def test_a_batch_of_only_masked_tokens_steps_nowhere(trainer):
    zeros = np.zeros(N, np.float32)
    data = [datum(TOKENS, target_tokens=TOKENS, logprobs=zeros, advantages=zeros, mask=zeros)]
    state = trainer.create(lora(), "token_mean", target_alignment="by_shape")
    run(trainer, state, data, "ppo_loss")
    assert trainer.optim_step(state, AdamParams())["grad_norm"] == 0


@pytest.mark.parametrize(
    ("loss", "inputs", "message"),
    [
        ("causallm_loss", {"labels": TOKENS, "target_tokens": TOKENS}, "target_tokens and labels"),
        (
            "causallm_loss",
            {"labels": TOKENS, "wieghts": np.ones(8, np.float32)},
            r"'wieghts'\] is unknown; did you mean 'weights'\?",
        ),
        ("causallm_loss", {"labels": TOKENS[1:]}, r"'labels'\] has shape \[7\]; .* must be \[8\]"),
        (
            "causallm_loss",
            {"labels": TOKENS, "weights": np.ones(7, np.float32)},
            r"'weights'\] has shape \[7\]; .* must be \[8\]",
        ),
        ("causallm_loss", {"target_tokens": TOKENS[:3]}, r"\[3\] .* has 5 at position 0, .* ends with 9"),
        (
            "ppo",
            {"target_tokens": TOKENS[-3:], "logprobs": Q, "advantages": A[-3:]},
            r"'logprobs'\] has shape \[8\]; .* must be \[3\]",
        ),
        ("ppo", {"target_tokens": TOKENS, "logprobs": Q, "old_logprobs": Q}, "old_logprobs and logprobs"),
        ("ppo", {"target_tokens": TOKENS, "logprobs": Q, "mask": Q}, "no 'advantages'"),
        (
            "policy_loss",
            {"target_tokens": TOKENS, "logprobs": Q, "advantages": A, "mask": np.ones(3, np.int64)},
            r"'mask'\] has shape \[3\]",
        ),
    ],
)
def test_a_datum_without_a_layout_is_named(trainer, loss, inputs, message):
    state = trainer.create(lora(), target_alignment="by_shape")
    with pytest.raises(UserError, match=f"datum 0: .*{message}"):
        run(trainer, state, [datum(TOKENS, **inputs)], loss)


@pytest.mark.parametrize("ratio_type", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
def test_references_and_sequences_reach_the_loss(trainer, ratio_type):
    """drgrpo with a KL term, two sequences packed in a row; against NumPy, one at a time."""
    config = {"ratio_type": ratio_type, "beta": 0.5, "kl_type": "k2"}
    data = []
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        extra = {
            name: (-5.7 + 0.3 * rng.normal(size=N)).astype(np.float32)
            for name in ("old_logprobs", "ref_logprobs")
        }
        advantages = rng.normal(size=N).astype(np.float32)
        advantages[:2] = 0
        data.append((extra, advantages))
    state = with_random_b(trainer.create(lora(), target_alignment="by_shape"))
    datums = [datum(TOKENS, target_tokens=TOKENS, advantages=a, **extra) for extra, a in data]
    output = run(trainer, state, datums, "drgrpo", config)
    want = 0.0
    for (extra, a), logprobs in zip(data, output.logprobs, strict=True):
        at = a != 0
        log_ratio = logprobs - extra["old_logprobs"]
        ratio = np.exp(log_ratio if ratio_type == "token" else log_ratio[at].mean())
        clipped = np.clip(ratio, 0.8, 1.28)
        want += np.maximum(-ratio * a, -clipped * a)[at].sum()
        want += 0.5 * 0.5 * ((logprobs - extra["ref_logprobs"])[at] ** 2).sum()
    assert output.metrics["loss:sum"] == pytest.approx(want, rel=1e-4)
    with pytest.raises(UserError, match="datum 0: loss_fn_inputs has no 'ref_logprobs'"):
        run(trainer, state, [datum(TOKENS, target_tokens=TOKENS, logprobs=Q, advantages=A)], "drgrpo", config)
