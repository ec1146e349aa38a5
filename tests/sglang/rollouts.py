"""Reinforcement learning through the unmodified SDK, and who drew its samples."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import numpy as np
import tinker
from conformance.batches import logprobs
from conformance.server_process import Wire
from tinker import types

PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13]]
ADAM = types.AdamParams(learning_rate=3e-2)
GREEDY = types.SamplingParams(max_tokens=10, temperature=0.0, stop=[])
DRAWN = types.SamplingParams(max_tokens=10, temperature=1.0, stop=[])


def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def counted(alice: Wire, name: str) -> float:
    """The sum of a metric of ours."""
    found = re.findall(rf"^{name}(?:_total)?{{.*}} (\S+)$", alice.http.get("/metrics").text, re.MULTILINE)
    return sum(map(float, found))


def drawn_there(alice: Wire) -> float:
    return counted(alice, "tinsmith_sglang_samples")


def is_up(alice: Wire) -> bool:
    return counted(alice, "tinsmith_sglang_up") == 1.0


def sampled(
    sampler: tinker.SamplingClient, params: types.SamplingParams, count: int = 1
) -> list[list[types.SampledSequence]]:
    """Sample each prompt, all at once."""
    futures = [
        sampler.sample(types.ModelInput.from_ints(prompt), num_samples=count, sampling_params=params)
        for prompt in PROMPTS
    ]
    return [list(future.result().sequences) for future in futures]


def rollout(prompt: list[int], sequence: types.SampledSequence, advantage: float) -> types.Datum:
    unscored, count = len(prompt) - 1, len(sequence.tokens)
    assert sequence.logprobs is not None
    return types.Datum(
        model_input=types.ModelInput.from_ints(prompt + sequence.tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": prompt[1:] + sequence.tokens,
            "logprobs": [0.0] * unscored + list(sequence.logprobs),
            "advantages": [0.0] * unscored + [advantage] * count,
        },
    )


def reward(tokens: list[int]) -> float:
    return float(np.mean([token % 2 == 0 for token in tokens]))


def step(training: tinker.TrainingClient, groups: list[list[types.SampledSequence]]) -> float:
    """One step on rollouts; the mean difference of their log-probs from the trainer's."""
    data = []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        rewards = [reward(sequence.tokens) for sequence in group]
        data += [rollout(prompt, each, r - np.mean(rewards)) for each, r in zip(group, rewards, strict=True)]
    done = training.forward_backward(data, "importance_sampling").result()
    differences = []
    for datum, found in zip(data, logprobs(done), strict=True):
        said = np.asarray(datum.loss_fn_inputs["logprobs"].data)
        differences.append(np.abs(found - said)[said != 0])
    training.optim_step(ADAM).result()
    return float(np.mean(np.concatenate(differences)))


def texts(groups: list[list[types.SampledSequence]]) -> list[list[int]]:
    return [list(group[0].tokens) for group in groups]
