"""Compile programs for devices that are not here, and print what the compilers made of them, as JSON.

It reads lines `TARGET CASE` from its standard input, and answers each with a line of JSON.

A target is a device of `tinsmith plan`, such as h200, h200x8 or v5p-8. A case is NAME or
NAME:OPTION=VALUE,... (see CASES), for example "step:model=8b,length=32768,remat=full" or
"step:fsdp=4,tensor=2,rows=4". It runs in the environment of requirements.txt, in a process of its own.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from tinsmith.engine import compile_only, device_catalogue

os.environ |= compile_only.ENVIRONMENT  # before JAX is imported

# isort: split
import hlo
import jax
import jax.numpy as jnp
from decoding import decode_case, prefill_case
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tinsmith.engine.messages import LoraSpec
from tinsmith.engine.training.trainer import Trainer
from tinsmith.model import decoder, sharding
from tinsmith.model.config import ModelConfig
from tinsmith.model.folder import stated_config
from tinsmith.model.kernels.attention import attention

GIB = 2**30
_QWEN = {"model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 131_072, "rope_theta": 1e6}
_MIXTURE = _QWEN | {"model_type": "qwen3_moe", "norm_topk_prob": True, "num_key_value_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": _QWEN
    | {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1280,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "8b": _QWEN
    | {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "mixture": _MIXTURE
    | {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1280,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "moe_intermediate_size": 320,
        "num_experts": 32,
        "num_experts_per_tok": 4,
    },
    "30b-a3b": _MIXTURE
    | {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "70b": {
        "model_type": "llama",
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "vocab_size": 128_256,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""The config.json of a tiny model and a tiny mixture, and those of the shapes of Qwen3-8B, Qwen3-30B-A3B and
Llama-3-70B."""


def make_mesh(target: str, axes: dict[str, int]) -> Mesh:
    """Return the server's mesh on the first of a target's devices."""
    sizes = tuple(axes.get(name, 1) for name in sharding.MESH_AXES)
    there = compile_only.devices(device_catalogue.find(target)).flat[: math.prod(sizes)]
    auto = (AxisType.Auto,) * len(sizes)
    return Mesh(there.reshape(sizes), sharding.MESH_AXES, axis_types=auto)


def report(compiled: jax.stages.Compiled, cpu_seconds: float) -> dict[str, Any]:
    """Return what the tests and the page show of a program. Sizes are bytes per device."""
    memory = compiled.memory_analysis()
    program = hlo.parse(text := compiled.as_text())
    if folder := os.environ.get("TINSMITH_KEEP_HLO"):
        (Path(folder) / f"{time.time():.0f}.hlo").write_text(text)
    buffers = program.buffers()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "total": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "buffers": sorted(buffers, key=hlo.size_of, reverse=True),
        "collectives": [[kind, shape, n] for (kind, shape), n in program.collectives().items()],
        "calls": dict(program.calls()),
        "products": dict(program.products()),
        "cpu_seconds": round(cpu_seconds, 1),
    }


def attention_case(
    mesh: Mesh, *, length: int = 8192, rows: int = 1, head_dim: int = 128, window: int = 0, sinks: int = 0
) -> Any:
    """Attention of one layer with its gradient, by the shapes of Qwen3-8B."""

    def array(dtype: Any, *shape: int, axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        spec = sharding.partition_spec(shape, axes, mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    q, k, v = (
        array(jnp.bfloat16, rows, length, heads, head_dim, axes=("rows", "tokens", name, "head_dim"))
        for heads, name in ((32, "heads"), (8, "kv_heads"), (8, "kv_heads"))
    )
    start = array(jnp.int32, rows, length, axes=("rows", "tokens"))
    logits = jax.ShapeDtypeStruct((32,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))

    def both(q: Any, k: Any, v: Any, logits: Any, start: Any, d_out: Any) -> Any:
        def forward(q: Any, k: Any, v: Any, logits: Any) -> Any:
            sinks_ = logits if sinks else None
            return attention(q, k, v, start, head_dim**-0.5, window=window or None, sinks_N=sinks_)

        out, pull = jax.vjp(forward, q, k, v, logits)
        return out, pull(d_out)

    with jax.set_mesh(mesh):
        return jax.jit(both).lower(q, k, v, logits, start, q).compile()


def step_case(
    mesh: Mesh,
    *,
    model: str = "tiny",
    length: int = 1536,
    rows: int = 1,
    rank: int = 32,
    remat: str = "full",
    layers: int = 0,
    full: int = 0,
) -> Any:
    """The training step of one LoRA adapter on all matrices and the head, or (`full`) of all weights."""
    trainer = _trainer(mesh, model, remat, layers)
    (compiled,) = trainer.warm_up(None if full else LoraSpec(rank=rank, alpha=32, seed=0), [(length, rows)])
    return compiled


def optimizer_case(
    mesh: Mesh, *, model: str = "tiny", rank: int = 32, family: str = "adamw", full: int = 0
) -> Any:
    """A step of the optimizer of a LoRA adapter on all matrices and the head, or (`full`) of all weights."""
    spec = None if full else LoraSpec(rank=rank, alpha=32, seed=0)
    return _trainer(mesh, model, "full", 0).warm_up_optimizer(spec, family)


def _config(model: str, layers: int = 0) -> ModelConfig:
    stated = MODELS[model] | ({"num_hidden_layers": layers} if layers else {})
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(stated))
        return stated_config(Path(folder))


def _trainer(mesh: Mesh, model: str, remat: str, layers: int) -> Trainer:
    config = _config(model, layers)
    graph, base = decoder.build(config, jnp.bfloat16)
    shardings = sharding.shardings_for(base, decoder.logical_axes(config), mesh)
    base = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), base, shardings)
    return Trainer(graph, base, config, mesh, remat=remat)


def of_model(case: Callable) -> Callable:
    """A case of `decoding`, with the option `model` instead of a config."""
    return lambda mesh, model="tiny", **options: case(mesh, _config(model), **options)


CASES: dict[str, Callable] = {
    "attention": attention_case,
    "step": step_case,
    "optimizer": optimizer_case,
    "decode": of_model(decode_case),
    "prefill": of_model(prefill_case),
}


def main() -> None:
    for line in sys.stdin:
        target, case = line.split()
        name, _, text = case.partition(":")
        options = dict(option.split("=") for option in text.split(",") if option)
        axes = {axis: int(options.pop(axis)) for axis in sharding.MESH_AXES if axis in options}
        chosen: dict[str, Any] = {k: int(v) if v.isdigit() else v for k, v in options.items()}
        began = time.process_time()
        try:
            compiled = CASES[name](make_mesh(target, axes), **chosen)
            found = report(compiled, time.process_time() - began)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps({"case": case} | found), flush=True)


if __name__ == "__main__":
    main()
