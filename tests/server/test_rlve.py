"""The parts of the server's own training that need no server: windows, prompts, answers, advantages, and what
is refused."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
from tinsmith.engine import messages
from tinsmith.server.errors import BadRequest
from tinsmith.server.http.model_creations import model_spec
from tinsmith.server.plugins.rlve import environments, rollouts
from tinsmith.server.plugins.rlve.environments import Environments, Problem
from tinsmith.server.plugins.rlve.rollouts import Difficulty
from tinsmith.server.settings import Settings
from tinsmith.server.wire.requests import CreateModel, RlveConfig


def test_the_window_moves_up_when_its_top_is_mastered() -> None:
    """Enough is 8 samples here, mastered 0.75. What is below the top is not counted."""
    difficulty = Difficulty(top=2, highest=3)
    assert list(difficulty.window(2)) == [1, 2]
    assert list(difficulty.window(4)) == [0, 1, 2]
    difficulty = difficulty.counted([(2, 4, 3), (1, 4, 4)], enough=8, threshold=0.75)
    assert (difficulty.top, difficulty.samples, difficulty.right) == (2, 4, 3)
    poor = difficulty.counted([(2, 4, 2)], enough=8, threshold=0.75)
    assert poor == Difficulty(2, 3, accuracy=5 / 8), "too few were right, and it is counted anew"
    good = difficulty.counted([(2, 4, 3)], enough=8, threshold=0.75)
    assert good == Difficulty(3, 3, accuracy=6 / 8)
    assert good.counted([(3, 8, 8)], enough=8, threshold=0.75).top == 3, "there is no higher level"


@pytest.mark.parametrize(
    ("marker", "text", "found"),
    [
        ("<answer></answer>", "<answer>1</answer> no, <answer> 2\n</answer>", "2"),
        ("<answer></answer>", "<answer>1", None),
        ("\\boxed{}", "\\boxed{1} \\boxed{\\frac{1}{2}} so", "\\frac{1}{2}"),
        ("\\boxed{}", "\\boxed{1", None),
        ("\\boxed{}", "1", None),
        ("none", " 12 \n", "12"),
    ],
)
def test_the_last_answer_that_is_marked(marker, text: str, found: str | None) -> None:
    assert rollouts.answer(text, marker) == found


def test_advantages_are_those_of_grpo_and_the_prompt_has_none() -> None:
    rewards = [0.0, 1.0, 0.25, 0.25]
    expected = (np.array(rewards) - np.mean(rewards)) / (np.std(rewards, ddof=1) + 1e-6)
    np.testing.assert_allclose(rollouts.advantages(rewards), expected, rtol=1e-12)
    assert not rollouts.differ([0.5, 0.5])
    sampled = [_sequence([7, 8], [-0.5, -1.5]), _sequence([9], [-2.0])]
    draw = rollouts.Draw(Problem("chain_sum", 0, 1), 2)
    first, second = rollouts.datums(rollouts.Group(draw, [4, 5, 6], sampled, [1.0, 0.0]), "reward")
    assert _values(first.inputs["target_tokens"]) == [5, 6, 7, 8]
    assert np.frombuffer(first.tokens, "<i4").tolist() == [4, 5, 6, 7]
    assert _values(first.inputs["logprobs"]) == [0, 0, -0.5, -1.5]
    assert _values(second.inputs["advantages"]) == pytest.approx([0, 0, -(0.5**0.5)], abs=1e-5)


def test_the_metrics_of_a_step() -> None:
    first, second = (rollouts.Draw(Problem(name, 0, 1), 2) for name in ("a", "b"))
    sampled = [_sequence([7, 8], [-0.5, -1.5]), _sequence([9], [-2.0])]
    groups = [
        rollouts.Group(first, [4], sampled, [1.0, 0.5]),
        rollouts.Group(second, [4], sampled, [0.0, 0.25]),
    ]
    told = rollouts.of_step(
        3, groups, 1, {"a": Difficulty(2, 4), "b": Difficulty(0, 4), "c": Difficulty(1, 4)}
    )
    assert (told["prompts"], told["trained_prompts"], told["response_tokens"]) == (2, 1, 1.5)
    numbers = rollouts.flat(told)
    assert numbers["rlve/reward_mean"] == pytest.approx(1.75 / 4)
    assert (numbers["rlve/accuracy"], numbers["rlve/a/accuracy"], numbers["rlve/b/accuracy"]) == (
        0.25,
        0.5,
        0,
    )
    assert (numbers["rlve/a/difficulty"], numbers["rlve/c/difficulty"]) == (2, 1)
    assert "rlve/c/accuracy" not in numbers, "nothing was asked of it"


def _sequence(tokens: list[int], logprobs: list[float]) -> messages.SampledSequence:
    return messages.SampledSequence(
        np.asarray(tokens, "<i4").tobytes(), np.asarray(logprobs, "<f4").tobytes(), "stop"
    )


def _values(tensor: messages.Tensor) -> list[float]:
    return np.frombuffer(tensor.data, {"int64": "<i8", "float32": "<f4"}[tensor.dtype]).tolist()


def test_draws_are_uniform_over_environments_and_their_windows_and_come_again() -> None:
    config = RlveConfig(environment_list=["a", "b"], difficulty_sliding_window_size=2, seed=3)
    difficulties = {"a": Difficulty(5, 9), "b": Difficulty(0, 9)}
    drawn = rollouts.draws(config, difficulties, 1, 0)
    first = [next(drawn) for _ in range(2000)]
    counts = {
        key: sum(each.problem[:2] == key for each in first) / 2000 for key in [("a", 4), ("a", 5), ("b", 0)]
    }
    assert counts == pytest.approx({("a", 4): 0.25, ("a", 5): 0.25, ("b", 0): 0.5}, abs=0.05)
    assert next(rollouts.draws(config, difficulties, 1, 0)) == first[0]
    assert next(rollouts.draws(config, difficulties, 2, 0)) != first[0]
    assert next(rollouts.draws(config, difficulties, 1, 1)) != first[0]


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"n_samples_per_prompt": 1}, "n_samples_per_prompt: a sample is compared"),
        ({"rollout_temperature": 0}, "rollout_temperature"),
        ({"loss_fn": "cross_entropy"}, "loss_fn: cross_entropy needs"),
        ({"loss_fn": "none"}, "unknown loss 'none'"),
        ({"loss_fn": "drgrpo", "loss_fn_config": {"beta": 0.1}}, "beta needs log-probs of another model"),
        ({"rollout_batch_size": 4096, "n_samples_per_prompt": 5}, "over the 16384 datums"),
    ],
)
def test_impossible_configurations_are_refused_by_name(tmp_path, fields, wrong: str) -> None:
    config = {"enabled": True, "environment_list": ["chain_sum"], **fields}
    with pytest.raises(BadRequest, match=wrong):
        model_spec(
            CreateModel(base_model="tiny", lora_config={}, rlve_config=config),
            "model",
            "tinkercloud",
            Settings(data_dir=tmp_path),
        )


def test_fields_that_there_are_not_and_no_environments_are_refused() -> None:
    with pytest.raises(ValueError, match="no such fields: rollout_size"):
        RlveConfig(enabled=True, environment_list=["chain_sum"], rollout_size=3)
    with pytest.raises(ValueError, match="name at least one environment"):
        RlveConfig(enabled=True)
    assert not RlveConfig(rollout_size=3).enabled, "a block that is not enabled asks for nothing"


async def test_without_the_library_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadRequest, match="reasoning-gym"):
        await Environments().highest_level("chain_sum")


async def test_environments_answer_from_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers are the same problem, also after the process has ended; one that does not answer is
    ended; what runs answers as code is not there."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    gym = Environments()
    assert await gym.highest_level("chain_sum") > 3
    assert await gym.highest_level("spell_backward") == 3, "its list has no words for its fifth level"
    problem = Problem("chain_sum", 2, 17)
    question = await gym.question(problem)
    terms = re.findall(r"[+-]|\d+", question)
    right = str(eval("".join(terms)))
    assert len(terms) == 2 * 4 - 1, "level 2 has four terms"
    scores = await gym.scores(problem, [right, f"{right}.0", None, "", "x" * 1000])
    assert scores[:2] == [1.0, 1.0]
    assert scores[2:4] == [0.0, 0.0]
    assert scores[4] < 1
    gym.close()
    assert await gym.question(problem) == question
    for name in ("countdown", "no_such_environment"):
        with pytest.raises(BadRequest, match=name):
            await gym.highest_level(name)
    monkeypatch.setattr(environments, "_SECONDS", 0.0)
    assert await gym.scores(problem, [right]) == [0.0]
    gym.close()

    found = {name for name, (cls, _) in reasoning_gym.factory.DATASETS.items() if _runs_answers(cls)}
    assert found == environments.EXECUTING & reasoning_gym.factory.DATASETS.keys()


def _runs_answers(dataset: type) -> bool:
    source = inspect.getsource(inspect.getmodule(dataset))
    return re.search(r"\b(eval|exec|parse_expr|sympify)\((answer|user|pred)", source) is not None
