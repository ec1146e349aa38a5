"""A training program with calls that every SDK since 0.22 has; it prints its results as JSON.

Run with `TINKER_BASE_URL` and `TINKER_API_KEY` in the environment, by whatever `tinker` is on the path.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import tinker
import torch
from tinker import types

TOKENS = [5, 6, 7, 8, 9, 10, 11, 12]


def now(answer: Any) -> Any:
    """Newer SDKs give futures where older ones waited."""
    return answer.result() if hasattr(answer, "result") else answer


def datum(tokens: list[int]) -> types.Datum:
    inputs = {
        "target_tokens": types.TensorData.from_torch(torch.tensor(tokens[1:])),
        "weights": types.TensorData.from_torch(torch.ones(len(tokens) - 1)),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def twice_cross_entropy(
    data: list[types.Datum], logprobs: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    loss = -2 * sum(row.sum() for row in logprobs)
    return loss, {"custom": float(loss)}


def main() -> dict[str, Any]:
    service = tinker.ServiceClient()
    training = now(service.create_lora_training_client(base_model="tiny", rank=4, seed=7))
    data = [datum(TOKENS), datum(TOKENS[::-1])]
    seen: dict[str, Any] = {"version": version("tinker")}

    def loss(output: Any) -> float:
        return output.metrics["loss:sum"]

    seen["forward"] = loss(now(training.forward(data, "cross_entropy")))
    seen["losses"] = []
    for _ in range(3):
        future = training.forward_backward(data, "cross_entropy")
        step = training.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-8))
        seen["losses"].append(loss(now(future)))
        now(step)
    seen["custom"] = now(training.forward_backward_custom(data, twice_cross_entropy)).metrics["custom"]
    now(training.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-8)))
    saved = now(training.save_state("state")).path
    seen["trained"] = loss(now(training.forward(data, "cross_entropy")))
    loaded = now(service.create_training_client_from_state_with_optimizer(saved))
    seen["loaded"] = loss(now(loaded.forward(data, "cross_entropy")))
    weights = now(training.save_weights_for_sampler("weights")).path
    sampler = now(service.create_sampling_client(model_path=weights))
    params = types.SamplingParams(max_tokens=5, temperature=0.0, seed=1)
    sampled = now(sampler.sample(types.ModelInput.from_ints(TOKENS[:4]), 2, params))
    seen["sampled"] = [list(sequence.tokens) for sequence in sampled.sequences]
    scores = now(sampler.compute_logprobs(types.ModelInput.from_ints(TOKENS)))
    seen["scores"] = [score for score in scores if score is not None][-3:]
    return seen


if __name__ == "__main__":
    print(json.dumps(main()))
