"""Accelerators that plans know, in their usual slices. Imports no array library.

Peaks are the vendors' dense bfloat16 figures (NVIDIA's data sheets of the SXM boards; Google Cloud's TPU
documentation). The memory is what a program can use: 92 % of a GPU's, which the server lets JAX allocate, and
what the compiler grants on a TPU.
"""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass, replace

GIB = 1 << 30
GPU_SHARE = 0.92
"""The share of a GPU's memory that JAX allocates at its start (XLA_PYTHON_CLIENT_MEM_FRACTION)."""


@dataclass(frozen=True)
class Device:
    """`count` accelerators of one kind. Sizes and speeds are of each one, in bytes, FLOP/s and bytes/s.

    `topology` is what JAX's compile-only client calls the whole slice.
    """

    name: str
    kind: str  # the name without its size
    platform: str  # "gpu" or "tpu"
    memory: int
    flops: float  # bfloat16 products
    bandwidth: float  # of its memory
    interconnect: float  # to the other devices, in one direction
    topology: str
    count: int = 1

    @property
    def machines(self) -> int:
        """The number of hosts of the slice: 8 GPUs, 4 chips of a TPU, or a v5e-8 or v6e-8, have one."""
        if self.platform == "gpu" or (self.kind != "v5p" and self.count <= 8):
            return -(-self.count // 8)
        return -(-self.count // 4)

    @property
    def has_compiler(self) -> bool:
        """True if the compiler for this device is installed. Imports nothing."""
        return importlib.util.find_spec(_COMPILERS[self.platform]) is not None


_COMPILERS = {"tpu": "libtpu", "gpu": "jax_cuda12_plugin"}


def _gpu(name: str, memory: float, flops: float, bandwidth: float, interconnect: float) -> Device:
    return Device(name, name, "gpu", int(memory * GPU_SHARE), flops, bandwidth, interconnect, "1x1x1")


def _tpu(name: str, gib: float, flops: float, bandwidth: float, interconnect: float) -> Device:
    return Device(name, name, "tpu", int(gib * GIB), flops, bandwidth, interconnect, "1x1")


_GPUS = {
    "h200": _gpu("h200", 150.0e9, 989e12, 4.8e12, 450e9),
    "h100": _gpu("h100", 85.0e9, 989e12, 3.35e12, 450e9),
    "a100-80": _gpu("a100-80", 85.0e9, 312e12, 2.04e12, 300e9),
    "a100-40": _gpu("a100-40", 42.4e9, 312e12, 1.56e12, 300e9),
}
_TPUS = {
    "v5e": _tpu("v5e", 15.75, 197e12, 0.82e12, 200e9),
    "v5p": _tpu("v5p", 95.0, 459e12, 2.77e12, 600e9),
    "v6e": _tpu("v6e", 31.25, 918e12, 1.64e12, 400e9),
}
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
# A v5p slice is named after its cores, of which each chip has two.
_CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8"}
_SLICES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBES}
_GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
_ALIASES = {"a100": "a100-80", "v5litepod": "v5e"}


def _all_devices() -> dict[str, Device]:
    found = {}
    for name, gpu in _GPUS.items():
        for count in _GPU_COUNTS:
            hosts = max(1, count // 8)
            topology = f"1x{hosts}x{count // hosts}"
            slice_ = name if count == 1 else f"{name}x{count}"
            found[slice_] = replace(gpu, name=slice_, count=count, topology=topology)
    for name, tpu in _TPUS.items():
        for size, topology in _SLICES[name].items():
            chips = size // 2 if name == "v5p" else size
            slice_ = f"{name}-{size}"
            found[slice_] = replace(tpu, name=slice_, count=chips, topology=f"{name}:{topology}")
    return found


DEVICES = _all_devices()


def find(name: str) -> Device:
    """Return the device of that name, such as `h200`, `h200x8`, `a100`, `v5p-8` or `v5e-16`.

    A TPU generation alone means its smallest slice. Raises ValueError naming those that are known.
    """
    wanted = name.strip().lower()
    for alias, full in _ALIASES.items():
        if wanted == alias or (wanted.startswith((f"{alias}x", f"{alias}-")) and wanted not in DEVICES):
            wanted = full + wanted.removeprefix(alias)
    if wanted in _TPUS:
        wanted = f"{wanted}-{min(_SLICES[wanted])}"
    if wanted in DEVICES:
        return DEVICES[wanted]
    near = difflib.get_close_matches(wanted, DEVICES, 1, cutoff=0.7)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"unknown device {name!r}{hint}; known: {known()}")


def known() -> str:
    """Return the names of all devices, for messages."""
    gpus = [f"{name}, {name}x2 ... {name}x{_GPU_COUNTS[-1]}" for name in _GPUS]
    tpus = [", ".join(f"{name}-{size}" for size in sizes) for name, sizes in _SLICES.items()]
    return "; ".join([*gpus, *tpus])
