"""`weights_lifecycle.py MODEL MODEL_FOLDER FOLDER`: what the cookbook's tools make of trained weights.

Trains, downloads in both ways, merges and converts; prints how far the log-probs that transformers and PEFT
then compute are from the sampler's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import peft
import tinker
import torch
from safetensors.torch import load_file
from tinker_cookbook import weights
from transformers import AutoModelForCausalLM

TOKENS = np.random.default_rng(0).integers(5, 900, 48).tolist()


def by_torch(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0, :-1].double()
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(TOKENS[1:])[:, None])[:, 0].numpy()


def loaded(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def main(model: str, model_folder: Path, folder: Path) -> None:
    service = tinker.ServiceClient()
    training = service.create_lora_training_client(model, rank=8).result()
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(TOKENS[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=TOKENS[1:], dtype="int64", shape=[len(TOKENS) - 1]),
            "weights": tinker.TensorData(
                data=[1.0] * (len(TOKENS) - 1), dtype="float32", shape=[len(TOKENS) - 1]
            ),
        },
    )
    for _ in range(4):
        training.forward_backward([datum], "cross_entropy").result()
        training.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    sampler = training.save_weights_and_get_sampling_client().result()
    expected = np.array(sampler.compute_logprobs(tinker.ModelInput.from_ints(TOKENS)).result()[1:])

    external = training.save_weights_external("lifecycle").result().path
    state = training.save_state("lifecycle").result().path
    downloads = [
        Path(weights.download(tinker_path=path, output_dir=str(folder / name)))
        for name, path in (("external", external), ("state", state))
    ]
    plain, unsealed = (load_file(download / "adapter_model.safetensors") for download in downloads)
    same = plain.keys() == unsealed.keys() and all(torch.equal(plain[name], unsealed[name]) for name in plain)

    merged, sharded, adapter = (folder / name for name in ("merged", "sharded", "adapter"))
    common = {"base_model": str(model_folder), "adapter_path": str(downloads[0])}
    weights.build_hf_model(**common, output_path=str(merged), merge_strategy="full", dtype="float32")
    weights.build_hf_model(**common, output_path=str(sharded), merge_strategy="shard", dtype="float32")
    weights.build_lora_adapter(**common, output_path=str(adapter))
    beside = peft.PeftModel.from_pretrained(loaded(model_folder), adapter).eval()
    found = {
        "merged": by_torch(loaded(merged)),
        "sharded": by_torch(loaded(sharded)),
        "adapter": by_torch(beside),
    }
    report = {name: float(np.abs(logprobs - expected).max()) for name, logprobs in found.items()}
    report["learnt"] = float((expected - by_torch(loaded(model_folder))).mean())
    report["tensors"] = len(plain)
    report["exports_differ"] = int(not same)
    print(json.dumps(report))


main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
