"""PEFT's side of bench/train.py: transformers + PEFT on torch. Does not need tinsmith."""

import json
import sys
import time

import torch
from peak_memory import peak_mb, release, reset_peak
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

MICRO_BATCH = 4  # sequences
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def micro_batches(sequences: list[list[int]], padded: bool) -> list[torch.Tensor]:
    """Pad token ids with -1: to the batch's longest sequence, or, sorted, to each micro-batch's longest."""
    if not padded:
        sequences = sorted(sequences, key=len, reverse=True)
    parts = [sequences[i : i + MICRO_BATCH] for i in range(0, len(sequences), MICRO_BATCH)]
    longest = max(map(len, sequences))
    batches = []
    for part in parts:
        width = longest if padded else max(map(len, part))
        batches.append(torch.tensor([sequence + [-1] * (width - len(sequence)) for sequence in part]))
    return batches


def backward(model, batch: torch.Tensor, padded: bool) -> float:
    tokens, targets = batch[:, :-1], batch[:, 1:]
    mask = tokens >= 0
    if padded:  # the straightforward way: logits of the whole batch
        logits = model(input_ids=tokens.clamp(min=0), attention_mask=mask).logits
        logits, targets = logits.flatten(0, 1), targets.flatten()
    else:  # logits of real tokens only
        causal = model.get_base_model()
        hidden = causal.model(input_ids=tokens.clamp(min=0), attention_mask=mask).last_hidden_state
        real = targets >= 0
        logits, targets = causal.lm_head(hidden[real]), targets[real]
    loss = torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="sum")
    loss.backward()
    return loss.item()


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    padded = settings["padded"]
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=getattr(torch, settings["dtype"]), attn_implementation="sdpa"
    )
    targets = settings.get("target_modules", LINEARS) + (["lm_head"] if settings["train_unembed"] else [])
    # adapters in the base's dtype: faster than PEFT's default of float32 adapters under bfloat16
    model = get_peft_model(
        model,
        LoraConfig(
            r=settings["rank"],
            lora_alpha=32,
            target_modules=targets,
            target_parameters=settings.get("target_parameters"),
        ),
        autocast_adapter_dtype=False,
    )
    model.config.use_cache = False
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        sequences = json.loads(line)["sequences"]
        reset_peak()
        began, cpu = time.perf_counter(), time.process_time()
        batches = micro_batches(sequences, padded)
        loss = sum(backward(model, batch, padded) for batch in batches)
        middle = time.perf_counter()
        adam.step()
        adam.zero_grad()
        ended = time.perf_counter()
        answer = {
            "loss": loss / sum(len(sequence) - 1 for sequence in sequences),
            "seconds": ended - began,
            "cpu_seconds": time.process_time() - cpu,
            "optim_seconds": ended - middle,
            "peak_mb": peak_mb(),
            "computed_tokens": sum(batch[:, 1:].numel() for batch in batches),
        }
        release()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
