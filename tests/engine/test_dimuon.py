"""Muon for matrices, AdamW for the rest: against an independent implementation in NumPy, and torch's."""

from functools import partial

import jax
import numpy as np
import pytest
from engine_training import (
    lora,
    make_trainer,
    operation,
    random_data,
    relative,
    run,
    with_random_b,
    worst,
)
from tinsmith.ckpt import training_state
from tinsmith.engine.errors import UserError
from tinsmith.engine.messages import AdamParams, DimuonParams
from tinsmith.engine.optimizers import dimuon
from tinsmith.engine.training.training_state import TrainingState

RANK, PADDED, STEPS = 5, 8, 5
LR = [0.02 / (i + 1) for i in range(STEPS)]
PARAMS = DimuonParams(learning_rate=1e-2)


def adapter(seed, padded=RANK):
    """Two layers of one linear, and an unembedding whose rank is over one of its sides."""
    rng = np.random.default_rng(seed)

    def pair(*layers, into, out):
        a, b = rng.normal(size=(*layers, into, RANK)), rng.normal(size=(*layers, RANK, out))
        more = [(0, 0)] * len(layers)
        a = np.pad(a, [*more, (0, 0), (0, padded - RANK)])
        b = np.pad(b, [*more, (0, padded - RANK), (0, 0)])
        return {"a": a.astype(np.float32), "b": b.astype(np.float32)}

    return {"layers": {"q_proj": pair(2, into=24, out=16)}, "unembed": pair(into=6, out=40)}


def full(seed):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    layers = {
        "q_proj": {"weight": normal(2, 12, 20), "bias": normal(2, 20)},
        "norm": {"weight": normal(2, 12)},
    }
    return {"layers": layers, "embed_tokens": {"weight": normal(30, 12)}, "norm": {"weight": normal(12)}}


def ours(tree, clip=0.0, scale=1.0, rank=RANK):
    weights, step = jax.device_put(tree(0)), jax.jit(dimuon.step)
    state = dimuon.new_state(np.int32(0), lambda: jax.tree.map(np.zeros_like, tree(0)))
    state, compiled = jax.device_put(state), step._cache_size()
    for i, lr in enumerate(LR):
        hyper = dimuon.DimuonHyperparameters(*map(np.float32, (lr, 0.9, clip, scale, rank)))
        weights, state, zeros, _ = step(weights, state, tree(i + 1), hyper)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(zeros))
    assert step._cache_size() <= compiled + 1  # a new learning rate compiles nothing
    return weights


def orthogonalised(u):
    """The published iteration, one matrix at a time, in float64."""
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / max(np.linalg.norm(x), 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


def in_numpy(tree, muon, clip=0.0, scale=1.0):
    """`muon`: the leaves that are matrices, by their numbers; a leading axis is of layers."""
    weights = [leaf.astype(np.float64) for leaf in jax.tree.leaves(tree(0))]
    m, v = ([np.zeros_like(leaf) for leaf in weights] for _ in range(2))
    for t, lr in enumerate(LR, 1):
        gradients = [scale * leaf.astype(np.float64) for leaf in jax.tree.leaves(tree(t))]
        norm = np.sqrt(sum((g**2).sum() for g in gradients))
        for i, g in enumerate(gradients):
            g = g * (clip / norm if clip and norm > clip else 1)
            m[i] = 0.9 * m[i] + 0.1 * g
            if i in muon:
                u = 0.9 * m[i] + 0.1 * g
                each = u.reshape(-1, *u.shape[-2:])
                direction = np.stack([orthogonalised(one) for one in each]).reshape(u.shape)
                weights[i] -= lr * 0.2 * np.sqrt(max(u.shape[-2:])) * direction
            else:
                v[i] = 0.95 * v[i] + 0.05 * g**2
                weights[i] -= lr * m[i] / (1 - 0.9**t) / (np.sqrt(v[i] / (1 - 0.95**t)) + 1e-12)
    return weights


def moved(weights, tree):
    return [
        np.asarray(w, np.float64) - t
        for w, t in zip(jax.tree.leaves(weights), jax.tree.leaves(tree(0)), strict=True)
    ]


@pytest.mark.parametrize(("clip", "scale"), [(0.0, 1.0), (1.5, 0.25)])
def test_equals_an_implementation_in_numpy(clip, scale):
    for tree, muon in ((adapter, {0, 1, 2, 3}), (full, {3})):
        leaves = jax.tree_util.tree_leaves_with_path(tree(0))
        matrices = [jax.tree_util.keystr(leaves[i][0]) for i in sorted(muon)]
        assert all("'a'" in m or "'b'" in m or m.endswith("['q_proj']['weight']") for m in matrices), matrices
        got, want = ours(tree, clip, scale), in_numpy(tree, muon, clip, scale)
        assert worst(jax.tree.leaves(got), want) < 1e-6
        # the weights' own rounding, against how far they moved
        assert worst(moved(got, tree), moved(want, tree)) < 5e-5


def test_the_rank_s_padding_changes_nothing():
    bare, padded = ours(adapter), ours(partial(adapter, padded=PADDED))
    for name in ("a", "b"):
        for got, want in (
            (padded["layers"]["q_proj"], bare["layers"]["q_proj"]),
            (padded["unembed"], bare["unembed"]),
        ):
            kept = (..., slice(RANK)) if name == "a" else (..., slice(RANK), slice(None))
            left = (..., slice(RANK, None)) if name == "a" else (..., slice(RANK, None), slice(None))
            assert relative(got[name][kept], want[name]) < 1e-6
            assert (np.asarray(got[name][left]) == 0).all()


@pytest.mark.reference
def test_equals_torch_muon_but_for_its_rounding():
    """torch iterates in bfloat16."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(16, 40)), rng.normal(size=(STEPS, 16, 40))
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    muon = torch.optim.Muon([parameter], momentum=0.9, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for lr, gradient in zip(LR, gradients, strict=True):
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        muon.param_groups[0]["lr"] = lr
        muon.step()

    def tree(i):
        leaf = start if i == 0 else gradients[i - 1]
        return {"layers": {"linear": {"weight": leaf[None].astype(np.float32)}}}

    (got,) = moved(ours(tree), tree)
    assert relative(got[0], parameter.detach().numpy() - start) < 2e-2


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("model"))


def model(trainer, family="dimuon", seed=1, spec=None):
    return with_random_b(trainer.create(spec or lora(RANK, seed=seed), family=family), seed)


def params_of(state):
    return PARAMS if state.family == "dimuon" else AdamParams(learning_rate=1e-2, eps=1e-8)


def test_models_of_either_optimizer_share_a_batch(trainer):
    families = ("dimuon", "adamw", "dimuon")
    alone, together = ([model(trainer, family, i) for i, family in enumerate(families)] for _ in range(2))
    for step in range(2):
        data = [random_data([20, 9], seed=10 * step + i) for i in range(3)]
        jobs = [trainer.job(state, operation(of)) for state, of in zip(together, data, strict=True)]
        trainer.forward_backward(jobs)
        for state, of in zip(alone, data, strict=True):
            run(trainer, state, of)
        for state in (*together, *alone):
            assert trainer.optim_step(state, params_of(state))["optimizer_step"] == step + 1
    for one, other in zip(together, alone, strict=True):
        assert worst(one.weights, other.weights) < 1e-4
        padding = one.weights["layers"]["q_proj"]["a"][..., RANK:]
        assert padding.shape[-1] == PADDED - RANK
        assert (np.asarray(padding) == 0).all()


@pytest.mark.parametrize("spec", [lora(RANK), None], ids=["lora", "full"])
def test_a_run_that_is_resumed_equals_the_uninterrupted_one(trainer, tmp_path, spec):
    state = trainer.create(spec, family="dimuon")
    run(trainer, state, random_data([20]))
    trainer.optim_step(state, PARAMS)
    run(trainer, state, random_data([9], seed=1))
    training_state.save(tmp_path / "saved", state.arrays(), state.metadata()).result()
    metadata = training_state.read_metadata(tmp_path / "saved")
    del metadata["format_version"]
    arrays = training_state.restore(
        tmp_path / "saved", trainer.abstract_arrays(spec, True, metadata["family"])
    )
    again = TrainingState.from_checkpoint(arrays, metadata)
    assert bool(again.optimizer.squares) == (spec is None)  # an adapter has nothing but matrices
    for one in (state, again):
        run(trainer, one, random_data([30], seed=2))
        trainer.optim_step(one, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, state.arrays(), again.arrays())
    assert again.step == 2


def test_a_step_that_cannot_be_changes_nothing(trainer):
    state = model(trainer)
    before = jax.tree.map(np.array, state.weights)
    with pytest.raises(UserError, match="this model's optimizer is dimuon"):
        trainer.optim_step(state, AdamParams())
    with pytest.raises(UserError, match=r"optimizer_params\.beta1 is 1"):
        trainer.optim_step(state, DimuonParams(1e-3, beta1=1.0))
    run(trainer, state, random_data([20]))
    with pytest.raises(UserError, match="not finite"):
        trainer.optim_step(state, DimuonParams(3e38))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, state.weights))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.optimizer))
    run(trainer, state, random_data([20]))
    assert trainer.optim_step(state, DimuonParams(1e-2, grad_clip_norm=-1.0))["optimizer_step"] == 1
