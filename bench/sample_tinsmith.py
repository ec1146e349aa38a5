"""Tinsmith's side of bench/sample.py: the embedded sampler without a server."""

import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tinsmith.engine import messages
from tinsmith.engine.base_models import product_form
from tinsmith.engine.sampling.sampler import Sampler
from tinsmith.model import decoder, kv_cache, lora
from tinsmith.model.folder import read_config
from tinsmith.model.load import load_base
from tinsmith.model.sharding import make_mesh

DECODE_STEPS = 16


def copy_bandwidth() -> float:
    """Measure the bytes read and written per second by a copy far larger than any cache."""
    copy = jax.jit(lambda x: x + 1)
    x = jnp.zeros(64 << 20, jnp.float32)
    copy(x).block_until_ready()

    def seconds() -> float:
        began = time.perf_counter()
        copy(x).block_until_ready()
        return time.perf_counter() - began

    return 2 * x.nbytes / min(seconds() for _ in range(5))


def run(sampler: Sampler, key: str | None, prompts: list[list[int]], new_tokens: int) -> dict:
    """Sample all prompts together. `first` is the time of each answer, `steps` the duration of each call."""
    cpu, began = time.process_time(), time.perf_counter()
    for index, prompt in enumerate(prompts):
        params = messages.SamplingParams(max_tokens=new_tokens, stop_tokens=[], seed=index)
        tokens = np.asarray(prompt, np.int32).tobytes()
        request = messages.Sample(
            request_id=str(index),
            sampler=messages.SamplerRef(""),
            prompt=tokens,
            num_samples=1,
            params=params,
        )
        sampler.add(request, key)
    answered, steps = [], []
    while sampler.has_work:
        before = time.perf_counter()
        answers = sampler.step()
        now = time.perf_counter()
        answered += [now - began] * len(answers)
        steps.append(now - before)
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "answered": answered,
        "steps": steps,
    }


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    folder, dtype = Path(settings["model"]), jnp.dtype(settings["dtype"])
    config = read_config(folder)
    graph, _ = decoder.build(config, dtype, product_form(dtype, make_mesh()))
    base = load_base(folder, config, dtype)
    compiled = []
    sampler = Sampler(
        graph,
        base,
        config,
        kv_cache_tokens=settings["kv_cache_tokens"],
        decode_steps=DECODE_STEPS,
        on_compile=lambda name, seconds: compiled.append(seconds),
    )
    adapter = lora.init_lora(config, 0, settings["rank"], train_unembed=False)
    sampler.register("adapter", adapter, scale=1.0)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    answer = {
        "weight_bytes": weights,
        "kv_bytes_per_token": kv_cache.bytes_per_token(config, dtype),
        "bandwidth": copy_bandwidth(),
    }
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        prompts, new_tokens = question["prompts"], question["new_tokens"]
        key = "adapter" if question["adapter"] else None
        programs = len(compiled)
        first = run(
            sampler, key, question["other_prompts"], 1
        )  # other prompts, so that nothing comes from the cache
        whole = run(sampler, key, prompts, new_tokens)
        chunks = [seconds / DECODE_STEPS for seconds in whole["steps"][len(first["steps"]) :]]
        answer = {
            "prefill_seconds": first["seconds"],
            "first_token_seconds": statistics.median(first["answered"]),
            "decode_seconds": whole["seconds"] - first["seconds"],
            "seconds": whole["seconds"],
            "cpu_seconds": whole["cpu_seconds"],
            "gaps": chunks,
            "compile_seconds": sum(compiled[programs:]),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
