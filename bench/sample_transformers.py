"""transformers' side of bench/sample.py: `generate` on torch. Does not need tinsmith."""

import json
import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock(StoppingCriteria):
    """A stopping criterion that records the time of each token and never stops."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids, scores, **_):
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def generate(model, prompts: list[list[int]], new_tokens: int) -> dict:
    """Sample all prompts in one batch, padded on the left."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    clock = Clock()
    cpu, began = time.process_time(), time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    ended = time.perf_counter()
    return {
        "prefill_seconds": clock.times[0] - began,
        "first_token_seconds": statistics.median([clock.times[0] - began]),
        "decode_seconds": ended - clock.times[0],
        "seconds": ended - began,
        "cpu_seconds": time.process_time() - cpu,
        "gaps": [later - earlier for earlier, later in zip(clock.times, clock.times[1:], strict=False)],
    }


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=getattr(torch, settings["dtype"]), attn_implementation="sdpa"
    )
    model = get_peft_model(
        model,
        LoraConfig(r=settings["rank"], lora_alpha=32, target_modules=LINEARS),
        autocast_adapter_dtype=False,
    )
    if settings["merged"]:
        model = model.merge_and_unload()
    model.eval()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(generate(model, question["prompts"], question["new_tokens"])), flush=True)


if __name__ == "__main__":
    main()
