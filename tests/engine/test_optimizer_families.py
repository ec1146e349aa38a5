"""SGD, the sign of the gradient and Muon: against optax, torch and NumPy, kept and resumed."""

import jax
import numpy as np
import optax
import pytest
from engine_training import lora, make_trainer, random_data, relative, run, with_random_b, worst
from tinsmith.ckpt import training_state
from tinsmith.engine.errors import UserError
from tinsmith.engine.messages import AdamParams
from tinsmith.engine.optimizers import optimizer_families
from tinsmith.engine.training.training_state import TrainingState

LR = [0.02, 0.01, 0.03]


def tree(seed):
    """One linear of two layers, and a vector."""
    rng = np.random.default_rng(seed)
    return {
        "layers": {"q_proj": {"weight": rng.normal(size=(2, 6, 10)).astype(np.float32)}},
        "norm": {"weight": rng.normal(size=5).astype(np.float32)},
    }


def ours(name, options=None, rank=0, of=tree, **params):
    family = optimizer_families.family(name)
    options = optimizer_families.filled(name, options or {})
    weights, step = jax.device_put(of(0)), jax.jit(family.step)
    state = jax.device_put(family.new_state(np.int32(0), lambda: jax.tree.map(np.zeros_like, of(0))))
    for t, lr in enumerate(LR, 1):
        hyper = family.hyperparameters(AdamParams(learning_rate=lr, **params), options, 1.0, rank)
        weights, state, zeros, _ = step(weights, state, of(t), hyper)
    assert step._cache_size() <= 2  # a new learning rate compiles nothing
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(zeros))
    return weights


def in_optax(transform, decay=0.0):
    """`decay` is decoupled; a coupled one is the transform's."""
    weights, state = tree(0), None
    for t, lr in enumerate(LR, 1):
        of_step = optax.chain(transform, optax.add_decayed_weights(decay), optax.scale(-lr))
        state = of_step.init(weights) if state is None else state
        updates, state = of_step.update(tree(t), state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights


@pytest.mark.reference
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}],
    ids=["plain", "heavy", "nesterov"],
)
def test_sgd_equals_torch(options, clip):
    torch = pytest.importorskip("torch")
    parameters = [torch.tensor(leaf, requires_grad=True) for leaf in jax.tree.leaves(tree(0))]
    sgd = torch.optim.SGD(parameters, weight_decay=0.1, **options)
    for t, lr in enumerate(LR, 1):
        for parameter, gradient in zip(parameters, jax.tree.leaves(tree(t)), strict=True):
            parameter.grad = torch.tensor(gradient)
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        sgd.param_groups[0]["lr"] = lr
        sgd.step()
    got = jax.tree.leaves(ours("sgd", options, weight_decay=0.1, grad_clip_norm=clip))
    assert worst(got, [parameter.detach().numpy() for parameter in parameters]) < 1e-6


def test_signsgd_equals_its_formula_in_numpy():
    want = [leaf.astype(np.float64) for leaf in jax.tree.leaves(tree(0))]
    for t, lr in enumerate(LR, 1):
        gradients = jax.tree.leaves(tree(t))
        want = [w - lr * (np.sign(g) + 0.1 * w) for w, g in zip(want, gradients, strict=True)]
    assert worst(jax.tree.leaves(ours("signsgd", weight_decay=0.1)), want) < 1e-6


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("adamw", {"count", "mu.{}", "nu.{}"}),
        ("sgd", {"count", "momentum.{}"}),
        ("signsgd", {"count"}),
        ("muon", {"count", "momentum.{}", "squares"}),
        ("dimuon", {"count", "momentum.{}", "squares"}),
    ],
)
def test_the_state_has_the_arrays_that_checkpoints_have(name, fields):
    """Renaming one would make the checkpoints of earlier versions unreadable."""
    weights = ("layers.q_proj.weight", "norm.weight")
    want = {field.format(weight) for field in fields for weight in weights}
    if "squares" in want:  # by path, and only of what is not a matrix
        want = want - {"squares"} | {"squares.norm.weight"}
    state = optimizer_families.family(name).new_state(np.int32(0), lambda: tree(0))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state._asdict())]
    assert {".".join(key.key for key in path) for path in paths} == want


def test_clipping_is_of_the_global_norm():
    clipped = optax.clip_by_global_norm(0.5)
    assert worst(ours("sgd", grad_clip_norm=0.5), in_optax(clipped)) < 1e-6


@pytest.mark.slow
@pytest.mark.reference
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_equals_torch_but_for_its_rounding(adjust, nesterov):
    """torch iterates in bfloat16, and its matrices are outputs by inputs."""
    torch = pytest.importorskip("torch")
    start, *gradients = [
        tree(t)["layers"]["q_proj"]["weight"][0].astype(np.float32).T for t in range(len(LR) + 1)
    ]
    parameter = torch.nn.Parameter(torch.tensor(start.copy()))
    muon = torch.optim.Muon(
        [parameter], momentum=0.95, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust
    )
    for lr, gradient in zip(LR, gradients, strict=True):
        parameter.grad = torch.tensor(gradient.copy())
        muon.param_groups[0]["lr"] = lr
        muon.step()
    options = {"muon_adjust_lr_fn": adjust, "muon_nesterov": nesterov}
    got = ours("muon", options, weight_decay=0.1)["layers"]["q_proj"]["weight"][0]
    assert relative(np.asarray(got).T - start, parameter.detach().numpy() - start) < 2e-2


def test_muon_uses_adamw_for_everything_but_matrices():
    got = ours("muon", {"muon_lr_factor": 7.0}, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    adam = in_optax(optax.scale_by_adam(0.8, 0.9, 1e-6), decay=0.1)
    assert relative(got["norm"]["weight"], adam["norm"]["weight"]) < 1e-6


def test_muon_s_size_knows_an_adapter_s_true_rank():
    """A factor B of rank 3 padded to 8 with 12 outputs: the original size is sqrt(12 / 3)."""

    def of(seed):
        b = np.random.default_rng(seed).normal(size=(3, 12)).astype(np.float32)
        return {"unembed": {"b": np.pad(b, [(0, 5), (0, 0)])}}

    moved = {
        adjust: np.asarray(ours("muon", {"muon_adjust_lr_fn": adjust}, rank=3, of=of)["unembed"]["b"])
        - of(0)["unembed"]["b"]
        for adjust in ("original", "match_rms_adamw")
    }
    assert (moved["original"][3:] == 0).all()
    assert relative(moved["original"] / 2, moved["match_rms_adamw"] / (0.2 * 12**0.5)) < 1e-5


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sgd", {"momentum": 0.9}),
        pytest.param("signsgd", {}, marks=pytest.mark.slow),
        pytest.param("muon", {"muon_momentum": 0.8}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_resumed_equals_the_uninterrupted_one(trainer, tmp_path, family, options):
    """It has accumulated tokens since the last step, by which the mean divides."""
    params = AdamParams(learning_rate=1e-2)
    state = with_random_b(trainer.create(lora(), "token_mean", family, "by_shape", optimizer_options=options))
    run(trainer, state, random_data([20]))
    trainer.optim_step(state, params)
    run(trainer, state, random_data([9], seed=1))
    training_state.save(tmp_path / "saved", state.arrays(), state.metadata()).result()
    metadata = training_state.read_metadata(tmp_path / "saved")
    del metadata["format_version"], metadata["has_gradients"]
    arrays = training_state.restore(tmp_path / "saved", trainer.abstract_arrays(state.lora, True, family))
    again = TrainingState.from_checkpoint(arrays, metadata | {"has_gradients": True})
    assert (again.valid_tokens, again.target_alignment) == (9, "by_shape")
    assert again.optimizer_options == state.optimizer_options
    for one in (state, again):
        run(trainer, one, random_data([30], seed=2))
        trainer.optim_step(one, params)
    jax.tree.map(np.testing.assert_array_equal, state.arrays(), again.arrays())


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("adamw", {"momentum": 0.9}, "'adamw' has no option 'momentum'; it takes: none"),
        ("sgd", {"momentum": 1.0}, "must be at least 0 and below 1"),
        ("sgd", {"momentum": True}, "must be a finite number"),
        ("sgd", {"nesterov": True}, "needs a momentum"),
        ("muon", {"muon_ns_steps": 6}, "must be 5, the only possible value"),
        ("muon", {"muon_adjust_lr_fn": "none"}, "must be one of: original, match_rms_adamw"),
        ("muon", {"muon_nesterov": 1.0}, "must be true or false"),
    ],
)
def test_options_that_there_are_not(family, options, message):
    with pytest.raises(UserError, match=message):
        optimizer_families.filled(family, options)
