"""Training data for the SDK."""

from __future__ import annotations

import numpy as np
from tinker import types


def batch(count: int = 4, seed: int = 0) -> list[types.Datum]:
    """Sequences of mixed lengths over the tiny vocabulary, next token as target, some tokens masked."""
    random = np.random.default_rng(seed)
    datums = []
    for _ in range(count):
        tokens = random.integers(3, 300, random.integers(4, 40))
        datums.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1].tolist()),
                loss_fn_inputs={
                    "target_tokens": tokens[1:].tolist(),
                    "weights": (random.random(len(tokens) - 1) < 0.8).astype("float32").tolist(),
                },
            )
        )
    return datums


def logprobs(output: types.ForwardBackwardOutput) -> list[np.ndarray]:
    return [np.asarray(datum["logprobs"].data, "float32") for datum in output.loss_fn_outputs]


def targets(data: list[types.Datum]) -> list[int]:
    return [len(datum.loss_fn_inputs["target_tokens"].data) for datum in data]
