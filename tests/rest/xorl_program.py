"""A program with the uses of xorl-client 0.1.0: supervised training, checkpoints, `resume`, in a new
process, from what it left, and training on rewards. Its answer is a line of JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import xorl_client
from xorl_client import types

TOKENS = [5, 6, 7, 8, 9, 10, 11, 12]
ADAM = types.AdamParams(learning_rate=0.02, grad_clip_norm=5.0)


def datum() -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens=TOKENS[:-1]),
        loss_fn_inputs={"weights": [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0], "target_tokens": TOKENS[1:]},
    )


def step(client: Any) -> float:
    """Train one step, both operations submitted together as in xorl's examples; return the mean loss of the
    weighted tokens."""
    forward_backward = client.forward_backward([datum()], "cross_entropy")
    optim_step = client.optim_step(ADAM)
    output = forward_backward.result()
    assert optim_step.result().metrics["grad_norm"] > 0
    assert len(output.loss_fn_outputs[0]["logprobs"].tolist()) == 7
    return output.metrics["loss:mean"]


def supervised(service: Any, model_id: str) -> dict[str, Any]:
    client = service.create_lora_training_client(base_model="tiny", rank=8, alpha=11, model_id=model_id)
    losses = [step(client) for _ in range(6)]
    saved = client.save_state("half").result().path
    sampler = client.save_weights_for_sampler("s1").result().path
    after = [step(client) for _ in range(3)]
    listed = [each.checkpoint_id for each in client.list_checkpoints().result().checkpoints]
    client.save_state("gone").result()
    deleted = client.delete_checkpoint("weights/gone").result()
    assert deleted.success, deleted
    runs = service.create_rest_client().list_training_runs().result()
    (own,) = (run for run in runs.training_runs if run.training_run_id == model_id)
    assert own.last_checkpoint.path == f"xorl://{model_id}/weights/half", own
    assert own.last_sampler_checkpoint.path == sampler, own
    try:
        client.forward_backward([datum()], "no_such_loss").result()
    except Exception as error:
        refused = str(error)
    return {
        "losses": losses,
        "after": after,
        "saved": saved,
        "sampler": sampler,
        "listed": listed,
        "refused": refused,
    }


def resume(service: Any, saved: str) -> dict[str, Any]:
    client = service.create_training_client_from_state_with_optimizer(saved)
    losses = [step(client) for _ in range(3)]
    killed = client.kill_session(save_checkpoint=True).result()
    return {"losses": losses, "killed": killed.success, "path": killed.checkpoint_path}


def reinforce(service: Any, url: str, model_id: str) -> dict[str, Any]:
    """Reward tokens above 9: sample a group, train on it, and sample with the trained weights."""
    client = service.create_lora_training_client(base_model="tiny", rank=8, model_id=model_id)
    prompt = types.ModelInput.from_ints(tokens=TOKENS[:4])
    params = types.SamplingParams(max_tokens=4, temperature=1.0)
    rewards = []
    for number in range(8):
        path = client.save_weights_for_sampler(f"step-{number}").result().path
        sampler = service.create_sampling_client(
            base_url=url, model_path=path, api_key=service.holder.api_key
        )
        group = sampler.sample(prompt, params, num_samples=8).result().sequences
        scores = [sum(token < 160 for token in each.tokens) / len(each.tokens) for each in group]
        mean = sum(scores) / len(scores)
        rewards.append(mean)
        data = [of_sample(each, score - mean) for each, score in zip(group, scores, strict=True)]
        forward_backward = client.forward_backward(data, "importance_sampling")
        optim_step = client.optim_step(ADAM)
        forward_backward.result()
        optim_step.result()
    client.unload().result()
    return {"rewards": rewards}


def of_sample(sequence: Any, advantage: float) -> types.Datum:
    """Make a datum of a sample: pre-shifted, with zeros where the prompt is predicted."""
    tokens = TOKENS[:4] + list(sequence.tokens)
    count = len(sequence.tokens)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens=tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * 3 + list(sequence.logprobs),
            "advantages": [0.0] * 3 + [advantage] * count,
        },
    )


def main() -> None:
    url, (what, argument) = os.environ["XORL_BASE_URL"], sys.argv[1:3]
    service = xorl_client.ServiceClient(base_url=url, api_key=os.environ["XORL_API_KEY"])
    if what == "supervised":
        answer = supervised(service, argument)
    elif what == "resume":
        answer = resume(service, argument)
    else:
        answer = reinforce(service, url, argument)
    print(json.dumps(answer), flush=True)
    os._exit(0)  # otherwise the thread of its event loop would go on


main()
