"""One measurement of bench/device.py, in a process of its own: a line of JSON in, a line of JSON out.

The weights are random and on the first device. Memory is planned as the engine plans it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sample_tinsmith import copy_bandwidth
from sample_tinsmith import run as sample
from tinsmith.engine import compilation, device_catalogue, memory, precision, roofline
from tinsmith.engine.base_models import compute_dtype, product_form
from tinsmith.engine.budget import Budget
from tinsmith.engine.device_memory import capacity_bytes
from tinsmith.engine.messages import AdamParams, Datum, ForwardBackward, LoraSpec, Tensor
from tinsmith.engine.sampling.sampler import Sampler
from tinsmith.engine.training.trainer import Trainer
from tinsmith.model import decoder, kv_cache, lora
from tinsmith.model.config import ModelConfig
from tinsmith.model.counts import counts
from tinsmith.model.folder import stated_config
from tinsmith.model.sharding import make_mesh

RANK = 32
_QWEN3 = {"model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 131_072, "rope_theta": 1e6}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _QWEN3
    | {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": _QWEN3
    | {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": _QWEN3
    | {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    },
}
_KINDS = {"v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6 lite": "v6e", "v6e": "v6e"}


class Loaded(NamedTuple):
    """A model of random weights on the first device, and how the engine would divide its memory."""

    config: ModelConfig
    dtype: Any
    graph: Any
    base: Any
    plan: memory.EnginePlan
    budget: Budget


def load(shape: str, kv_tokens: int | None = None) -> Loaded:
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        config = stated_config(Path(folder))
    device = jax.devices()[0]
    dtype = compute_dtype("auto")
    precision.set_precision(dtype, device.platform)
    served = memory.Served(counts(config), config.max_sequence_length, dtype.itemsize)
    on_cpu = device.platform == "cpu"
    plan = memory.plan_engine([served], capacity_bytes(1), on_cpu=on_cpu, kv_cache_tokens=kv_tokens)
    graph, _ = decoder.build(config, dtype, product_form(dtype, make_mesh()))
    base = jax.block_until_ready(decoder.random_base(config, dtype))
    return Loaded(config, dtype, graph, base, plan, Budget(plan.budget))


def catalogued(kind: str) -> device_catalogue.Device | None:
    """Return a device's peaks by the name that JAX has for it; None if the catalogue lacks it."""
    words = kind.lower().removeprefix("tpu ").removeprefix("nvidia ")
    if words in _KINDS:
        return device_catalogue.find(_KINDS[words])
    name = words.replace("-", " ").split()[0]
    if name == "a100":
        name = "a100-80" if "80" in words else "a100-40"
    return device_catalogue.DEVICES.get(name)


def peak_bytes() -> int:
    """Return the most memory that the device had in use; on a CPU, that this process had."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        from peak_memory import peak_mb

        return int(peak_mb() * 2**20)
    return int((device.memory_stats() or {}).get("peak_bytes_in_use", 0))


def train(shape: str, rows: int, length: int, steps: int = 3) -> dict:
    """Forward, backward and an AdamW step of a LoRA adapter over `rows` datums of `length` tokens each."""
    loaded = load(shape)
    trainer, state = _training(loaded, rows, length)
    seconds, optimizer_seconds = [], []
    for step in range(1 + steps):
        began = time.perf_counter()
        forward_backward(trainer, state, rows, length, seed=step)
        middle = time.perf_counter()
        trainer.optim_step(state, AdamParams(learning_rate=1e-4))
        seconds.append(middle - began)
        optimizer_seconds.append(time.perf_counter() - middle)
    fastest = min(seconds[1:])
    of, work = counts(loaded.config), _work(loaded, length)
    remat = memory.choose_remat(of, rows * length, loaded.dtype.itemsize, loaded.plan.kept)
    plan = memory.MemoryPlan(loaded.plan.capacity, memory.Mesh(), remat, rows, length)
    found = {
        "first_seconds": seconds[0],
        "seconds": fastest,
        "optimizer_seconds": min(optimizer_seconds[1:]),
        "tokens_per_second": rows * length / fastest,
        "remat": remat,
        "peak_bytes": peak_bytes(),
    }
    if device := catalogued(jax.devices()[0].device_kind):
        found["mfu"] = roofline.step_flops(of, work, plan).useful / fastest / device.flops
        found["bound"] = roofline.training_bound(of, work, plan, device)
    return found


def decode(shape: str, batch: int, prompt: int, new_tokens: int) -> dict:
    """Sample `new_tokens` after each of `batch` prompts, with an unmerged LoRA adapter."""
    positions = batch * (-(-(prompt + new_tokens) // 64) + 1) * 64
    loaded = load(shape, kv_tokens=positions)
    sampler = Sampler(
        loaded.graph,
        loaded.base,
        loaded.config,
        mesh=make_mesh(),
        kv_cache_tokens=positions,
        max_sequence_length=min(loaded.config.max_sequence_length, 2 * (prompt + new_tokens)),
        max_slots=max(batch, 4),
        budget=loaded.budget,
    )
    sampler.register("adapter", lora.init_lora(loaded.config, 0, RANK), scale=1.0)
    rng = np.random.default_rng(0)

    def prompts() -> list[list[int]]:  # new ones each time, so that nothing comes from the cache
        return rng.integers(3, loaded.config.vocab_size, (batch, prompt)).tolist()

    sample(sampler, "adapter", prompts(), new_tokens)  # compiles
    sample(sampler, "adapter", prompts(), 1)
    prefilled = sample(sampler, "adapter", prompts(), 1)["seconds"]
    whole = sample(sampler, "adapter", prompts(), new_tokens)["seconds"]
    bandwidth = copy_bandwidth()
    stated = catalogued(jax.devices()[0].device_kind)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.base))
    if not loaded.config.tie_embeddings:
        weights -= loaded.base["embed_tokens"]["weight"].nbytes  # a token reads a few rows of it
    contexts = batch * (prompt + new_tokens / 2) * kv_cache.bytes_per_token(loaded.config, loaded.dtype)
    read = weights + contexts  # bytes for one more token of each sequence
    return {
        "prefill_tokens_per_second": batch * prompt / prefilled,
        "tokens_per_second": batch * (new_tokens - 1) / max(whole - prefilled, 1e-9),
        "limit": batch / read * (stated.bandwidth if stated else bandwidth),
        "copy_bandwidth": bandwidth,
        "peak_bytes": peak_bytes(),
    }


def start(shape: str, length: int, began: float) -> dict:
    """Measure the seconds from `began` (since 1970) to the weights on the device and to the first step."""
    loaded = load(shape)
    ready = time.time() - began
    trainer, state = _training(loaded, 1, length)
    forward_backward(trainer, state, 1, length)
    trainer.optim_step(state, AdamParams(learning_rate=1e-4))
    return {"ready_seconds": ready, "first_step_seconds": time.time() - began}


def forward_backward(trainer: Trainer, state: Any, rows: int, length: int, seed: int = 0) -> None:
    """Raises what went wrong. The outputs come to the host, so nothing is left to wait for."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, trainer.config.vocab_size, (rows, length + 1))
    ones = np.ones(length, np.float32).tobytes()
    data = [
        Datum(
            row[:-1].astype("<i4").tobytes(),
            {
                "target_tokens": Tensor("int64", (length,), row[1:].astype("<i8").tobytes()),
                "weights": Tensor("float32", (length,), ones),
            },
        )
        for row in tokens
    ]
    job = trainer.job(state, ForwardBackward("r", "m", data, "cross_entropy"))
    (result,) = trainer.forward_backward([job])
    if isinstance(result, Exception):
        raise result


def _training(loaded: Loaded, rows: int, length: int) -> tuple[Trainer, Any]:
    trainer = Trainer(
        loaded.graph,
        loaded.base,
        loaded.config,
        max_sequence_length=length,
        micro_batch_tokens=max(rows * length, loaded.plan.micro_batches[0]),
        budget=loaded.budget,
        kept_bytes=loaded.plan.kept,
    )
    return trainer, trainer.create(LoraSpec(RANK, 32.0, 0))


def _work(loaded: Loaded, length: int) -> memory.Workload:
    return memory.Workload(length, rank=RANK, itemsize=loaded.dtype.itemsize)


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    compilation.use_cache(Path(asked.pop("cache")))
    device = jax.devices()[0]
    case = {"train": train, "decode": decode, "start": start}[asked.pop("case")]
    about = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}
    try:
        found = case(**asked)
    except Exception as error:  # out of memory, most likely: the page says so
        found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    print(json.dumps(about | {"dtype": jnp.dtype(compute_dtype("auto")).name} | found), flush=True)


if __name__ == "__main__":
    main()
