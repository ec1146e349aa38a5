"""Whether models fit into memory, before a weight of them is loaded or downloaded."""

from __future__ import annotations

from collections.abc import Mapping

from ..engine import host_memory, memory
from ..engine.messages import Devices
from ..model.folder import ModelConfig, counts


def require_memory(
    models: Mapping[str, ModelConfig],
    devices: Devices,
    dtype: str = "auto",
    mesh: Mapping[str, int] | None = None,
    max_sequence_length: int | None = None,
    kv_cache_tokens: int | None = None,
) -> None:
    """Compare the least that an engine with these models needs with what is free.

    That is their weights, the smallest programs, one adapter in training and one sequence in the KV cache.
    Raises ValueError saying how much is needed, for what, how much there is, and what would do.
    """
    on_cpu = devices.platform == "cpu"
    sizes = memory.Mesh.of(mesh or {})
    free = host_memory.free_bytes() if on_cpu else devices.bytes_each
    if free is None or not models:
        return
    available = free // sizes.devices if on_cpu else free  # a CPU's devices share its memory
    kind = ("float32" if on_cpu else "bfloat16") if dtype == "auto" else dtype

    def plan(mesh: memory.Mesh, itemsize: int) -> memory.EnginePlan:
        longest = (min(max_sequence_length or 1 << 62, each.max_sequence_length) for each in models.values())
        served = [
            memory.Served(counts(config), length, itemsize)
            for config, length in zip(models.values(), longest, strict=True)
        ]
        return memory.plan_engine(served, available, mesh, on_cpu=on_cpu, kv_cache_tokens=kv_cache_tokens)

    here = plan(sizes, _ITEMSIZE[kind])
    if here.fits:
        return
    billions = sum(counts(config).parameters for config in models.values()) / 1e9
    of_each = "" if sizes.devices == 1 else " on each device"
    text = (
        f"too large: {', '.join(models)} needs {memory.in_gb(here.needed)}{of_each} "
        f"({memory.in_gb(here.base)} for {billions:.2f} billion parameters as {kind}, the rest for the "
        f"smallest programs, an adapter and a KV cache), and {memory.in_gb(available)} are free"
    )
    if not on_cpu:
        larger = (memory.Mesh(fsdp=2**power) for power in range(1, 10))
        for each in larger:
            if each.shards > sizes.shards and plan(each, _ITEMSIZE[kind]).fits:
                raise ValueError(f"{text}; {memory.number(each.devices)} of them with --mesh {each} would do")
    if kind == "float32":
        text += "; --dtype bfloat16 halves the weights"
    raise ValueError(text)


_ITEMSIZE = {"float32": 4, "bfloat16": 2}
