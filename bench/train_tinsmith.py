"""Tinsmith's side of bench/train.py: lines of JSON in and out."""

import json
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from peak_memory import peak_mb, release, reset_peak
from tinsmith.engine.base_models import product_form
from tinsmith.engine.messages import AdamParams, Datum, ForwardBackward, LoraSpec, Tensor
from tinsmith.engine.training.packing import computed_tokens, pack
from tinsmith.engine.training.trainer import Trainer
from tinsmith.model import decoder
from tinsmith.model.folder import read_config
from tinsmith.model.load import load_base
from tinsmith.model.sharding import make_mesh

ADAM = AdamParams(learning_rate=1e-4, eps=1e-8)


def datum(sequence: list[int]) -> Datum:
    tokens = np.array(sequence)
    weights = np.ones(len(tokens) - 1, np.float32)
    inputs = {
        "target_tokens": Tensor("int64", (len(weights),), tokens[1:].tobytes()),
        "weights": Tensor("float32", weights.shape, weights.tobytes()),
    }
    return Datum(tokens[:-1].astype("<i4").tobytes(), inputs)


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    folder, dtype = Path(settings["model"]), jnp.dtype(settings["dtype"])
    config = read_config(folder)
    graph, _ = decoder.build(config, dtype, product_form(dtype, make_mesh()))
    compile_seconds: list[float] = []
    trainer = Trainer(
        graph,
        load_base(folder, config, dtype),
        config,
        remat=settings["remat"],
        micro_batch_tokens=settings["micro_batch_tokens"],
        on_compile=lambda name, seconds: compile_seconds.append(seconds),
    )
    spec = LoraSpec(settings["rank"], 32.0, 0, train_unembed=settings["train_unembed"])
    state = trainer.create(spec)
    if settings.get("warm_up", True):
        trainer.warm_up(spec, [shape for shape in trainer.shapes.shapes if shape[0] <= 1024])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        sequences = json.loads(line)["sequences"]
        data = [datum(sequence) for sequence in sequences]
        lengths = [len(sequence) - 1 for sequence in sequences]
        reset_peak()
        began, cpu = time.perf_counter(), time.process_time()
        job = trainer.job(state, ForwardBackward("r", "m", data, "cross_entropy"))
        (output,) = trainer.forward_backward([job])
        middle = time.perf_counter()
        trainer.optim_step(state, ADAM)
        ended = time.perf_counter()
        answer = {
            "loss": output.metrics["loss:sum"] / sum(lengths),
            "seconds": ended - began,
            "cpu_seconds": time.process_time() - cpu,
            "optim_seconds": ended - middle,
            "peak_mb": peak_mb(),
            "computed_tokens": computed_tokens(pack(lengths, [0] * len(lengths), trainer.shapes)),
            "programs": len(trainer.programs),
            "compile_seconds": sum(compile_seconds),
        }
        release()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
