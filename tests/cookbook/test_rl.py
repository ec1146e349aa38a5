"""Recipes of reinforcement learning: the rewards rise."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
from cookbook.programs import Cookbook, Run
from cookbook.workplace import CHAT
from docs.pages import block, executed

pytestmark = pytest.mark.slow
MODEL = (f"model_name={CHAT}", "learning_rate=2e-3")
ENVIRONMENT = (*MODEL, "renderer_name=qwen3_instruct", "eval_every=0")
TRAINING = ("lora_rank=8", "save_every=0", "behavior_if_log_dir_exists=delete")


def test_rl_loop(cookbook: Cookbook, seen: Callable[[str, str], None]) -> None:
    """All questions have the answer 7, of which the model knows nothing: it gives any digit in its box."""
    sizes = ("batch_size=4", "group_size=16", "max_tokens=16", "max_steps=12", "save_every=0")
    run = cookbook.recipe("rl_loop", "rl_loop", *MODEL, "lora_rank=8", *sizes)
    reward = run.column("reward/total")
    seen(
        "`rl_loop`",
        f"reward {mean(reward[:2]):.2f} (two steps) to {mean(reward[-2:]):.2f} in {len(reward)} steps",
    )
    assert mean(reward[-2:]) > mean(reward[:2]) + 0.2
    assert {"state_path", "sampler_path"} <= run.checkpoints[-1].keys()


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("sync", ("compute_post_kl=True",)),
        ("async", ("max_steps_off_policy=2",)),
        (
            "minibatches",
            ("stream_minibatch_config.groups_per_batch=8", "stream_minibatch_config.num_minibatches=2"),
        ),
    ],
)
def test_math_rl(
    cookbook: Cookbook, seen: Callable[[str, str], None], kind: str, flags: tuple[str, ...]
) -> None:
    """The model cannot add; what it learns is to end its answer in six tokens, half of which it does not."""
    sizes = ("env=arithmetic", "group_size=8", "groups_per_batch=8", "max_tokens=6", "max_steps=8")
    run = cookbook.recipe("math_rl.train", f"math_rl_{kind}", *ENVIRONMENT, *TRAINING, *sizes, *flags)
    ended, kl = run.column("env/all/format"), run.column("optim/kl_sample_train_v1")
    seen(
        f"`math_rl.train`, {kind}",
        f"format {ended[0]:.2f} to {ended[-1]:.2f} in {len(ended)} steps; KL at first {abs(kl[0]):.0e}",
    )
    assert mean(ended[-2:]) > 0.9 > ended[0] + 0.1
    assert abs(kl[0]) < 1e-3, "the first step trains the weights that sampled"


def test_guess_number(cookbook: Cookbook, seen: Callable[[str, str], None]) -> None:
    """Ten turns; a guess that is none costs 1."""
    sizes = ("batch_size=4", "group_size=8", "max_tokens=16", "max_steps=5", "save_every=0")
    run = cookbook.recipe("multiplayer_rl.guess_number.train", "guess_number", *ENVIRONMENT, *sizes)
    reward, kl = run.column("env/all/reward/total"), run.column("optim/kl_sample_train_v1")
    seen("`guess_number`", f"reward {reward[0]:.2f} to {reward[-1]:.2f} in {len(reward)} steps of ten turns")
    assert reward[-1] > reward[0] + 1
    assert abs(kl[0]) < 1e-3, "several turns in one datum have the log-probs that they were sampled with"
    assert run.column("env/all/turns_per_episode")[0] > 2


def test_shorter(cookbook: Cookbook, seen: Callable[[str, str], None]) -> None:
    sizes = ("batch_size=4", "group_size=8", "max_tokens=64", "max_steps=10")
    run = cookbook.recipe("preference.shorter.train", "shorter", *ENVIRONMENT, *sizes)
    tokens = run.column("env/all/ac_tokens_per_turn")
    seen("`shorter`", f"answers of {tokens[0]:.1f} tokens, and of {tokens[-1]:.1f} after {len(tokens)} steps")
    assert tokens[-1] < 0.5 * tokens[0]


RECIPES = {
    "python -m tinker_cookbook.recipes.math_rl.train": ("importance_sampling", "ppo"),
    "python -m tinker_cookbook.recipes.rl_loop": ("",),
}


@pytest.mark.parametrize("begins", RECIPES)
def test_the_page_s_commands_run_to_their_end(cookbook: Cookbook, begins: str) -> None:
    """docs/rl.md's, with this folder's model; the losses are `LOSS` in the first of them."""
    for loss in RECIPES[begins]:
        command = block("rl.md", begins).replace("LOSS", loss)
        _python, *arguments = shlex.split(command, comments=True)
        names = {"$M": CHAT, "$U": cookbook.environment["TINKER_BASE_URL"], "meta-llama/Llama-3.2-1B": CHAT}
        for name, value in names.items():
            arguments = [each.replace(name, value) for each in arguments]
        (log,) = (each.partition("=")[2] for each in arguments if each.startswith("log_path="))
        cookbook.execute(Path(log).name, *arguments)
        executed(command)
        run = Run(cookbook.folder / log)
        assert len(run.metrics) == 6
        assert all(abs(kl) < 1e-3 for kl in run.column("optim/kl_sample_train_v1"))
