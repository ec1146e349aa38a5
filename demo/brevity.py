"""Teaches a real language model to be brief, by reinforcement learning through the unmodified Tinker SDK.

    python demo/brevity.py

Starts `tinsmith serve` with SmolLM2-135M, and rewards short answers with 1 - tokens / 32; an answer that does
not end within 32 tokens gets 0. Each step samples 8 answers to each of 8 questions from the newest weights,
and trains on all of them with `importance_sampling`. Exits with 0 only if the mean reward rose by 0.3, and
sampler and trainer agreed on the log-probs at the first step.
"""

import sys

import numpy as np
import tinker
from local_server import running_server
from tinker import types

MODEL = "smollm2-135m"
QUESTIONS = [
    "What is the sea?",
    "Why do birds sing?",
    "How is bread made?",
    "What is a mountain?",
    "Why is the sky blue?",
    "What does a smith do?",
    "How do boats float?",
    "What is snow?",
]
GROUP, MAX_TOKENS, STEPS, LEARNING_RATE = 8, 32, 9, 1e-3
RISE = 0.3


def reward(answer: types.SampledSequence) -> float:
    return 1 - len(answer.tokens) / MAX_TOKENS


def data_of(prompt: list[int], answers: list[types.SampledSequence]) -> list[types.Datum]:
    """Make one datum per answer.

    Its advantage is its reward relative to the group's, in standard deviations."""
    rewards = np.array([reward(answer) for answer in answers])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    unscored = [0.0] * (len(prompt) - 1)
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(prompt + answer.tokens[:-1]),
            loss_fn_inputs={
                "target_tokens": prompt[1:] + answer.tokens,
                "logprobs": unscored + answer.logprobs,
                "advantages": unscored + [float(advantage)] * len(answer.tokens),
            },
        )
        for answer, advantage in zip(answers, advantages, strict=True)
    ]


def kl(data: list[types.Datum], trained: tinker.types.ForwardBackwardOutput) -> float:
    """Estimate KL(sampler || trainer) in nats per sampled token.

    It is the mean of r - 1 - log r, where r = trainer / sampler."""
    terms = []
    for datum, output in zip(data, trained.loss_fn_outputs, strict=True):
        sampled = np.array(datum.loss_fn_inputs["logprobs"].data)
        difference = (np.array(output["logprobs"].data) - sampled)[sampled != 0]
        terms.append(np.exp(difference) - 1 - difference)
    return float(np.concatenate(terms).mean())


def main(url: str) -> int:
    service = tinker.ServiceClient(base_url=url, api_key="tml-demo")
    client = service.create_lora_training_client(base_model=MODEL, rank=16, seed=0).result()
    tokenizer = client.get_tokenizer()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    rewards, first_kl = [], 0.0
    for step in range(STEPS):
        sampler = client.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, seed=step)
        futures = [sampler.sample(types.ModelInput.from_ints(prompt), GROUP, params) for prompt in prompts]
        groups = [future.result().sequences for future in futures]
        rewards.append(float(np.mean([reward(answer) for answers in groups for answer in answers])))
        data = [d for pair in zip(prompts, groups, strict=True) for d in data_of(*pair)]
        forward_backward = client.forward_backward(data, "importance_sampling")
        optim_step = client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE))
        if step == 0:
            first_kl = kl(data, forward_backward.result())
        optim_step.result()
        text = " ".join(tokenizer.decode(groups[0][0].tokens).split())
        print(f"step {step}: mean reward {rewards[-1]:.3f}   {QUESTIONS[0]} {text}", flush=True)
    print(f"KL(sampler || trainer) at step 0: {first_kl:.1e}")
    service.close("success").result()
    learned = rewards[-1] - rewards[0] >= RISE and first_kl < 1e-3
    print("It learned to be brief." if learned else f"The reward rose by less than {RISE}.")
    return 0 if learned else 1


if __name__ == "__main__":
    with running_server(MODEL) as url:
        code = main(url)
    sys.exit(code)
