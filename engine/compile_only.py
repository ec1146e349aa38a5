"""Devices that need not be here, for which programs can be compiled by JAX's compile-only clients.

They need only the compilers: `libtpu` for TPUs, `jax-cuda12-plugin` and `jax-cuda12-pjrt` for GPUs (the extra
`[plan]`). The process's own backend stays the CPU; set `ENVIRONMENT` before JAX is imported.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .device_catalogue import Device

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # otherwise libtpu asks the cloud's host for its type, and waits
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}

# What the GPU compiler has to know about a device, from NVIDIA's tuning guides: name, compute capability,
# multiprocessors, memory, bandwidth, shared memory of a block and of a multiprocessor.
_GPUS = {
    "h200": ("NVIDIA H200", 9, 132, 150_000_000_000, 4_800_000_000_000, 232448, 233472),
    "h100": ("NVIDIA H100 80GB HBM3", 9, 132, 85_000_000_000, 3_350_000_000_000, 232448, 233472),
    "a100-80": ("NVIDIA A100-SXM4-80GB", 8, 108, 85_000_000_000, 2_039_000_000_000, 166912, 167936),
    "a100-40": ("NVIDIA A100-SXM4-40GB", 8, 108, 42_400_000_000, 1_555_000_000_000, 166912, 167936),
}
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: {per_core}
  shared_memory_per_block_optin: {per_block}
  threads_per_core_limit: 2048  core_count: {cores}  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: 62914560  clock_rate_ghz: 1.98  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: 0 }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


def devices(device: Device) -> np.ndarray:
    """Return the slice's devices, for a mesh. Raises what JAX raises if its compiler cannot be used."""
    from jax.experimental import topologies

    found: Any
    if device.platform == "tpu":
        found = topologies.get_topology_desc(platform="tpu", topology_name=device.topology)
    else:
        name, major, cores, memory, bandwidth, per_block, per_core = _GPUS[device.kind]
        target = _TARGET.format(
            name=name,
            major=major,
            cores=cores,
            memory=memory,
            bandwidth=bandwidth,
            per_block=per_block,
            per_core=per_core,
        )
        found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=device.topology)
    return np.array(found.devices)
