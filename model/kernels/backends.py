"""The backend that a program is compiled for.

It follows from the mesh that the program is compiled under (`jax.set_mesh`), not from JAX's default backend:
the two differ when a program is compiled for devices that this machine does not have.
"""

from __future__ import annotations

from typing import Literal

import jax

Backend = Literal["reference", "cpu", "gpu", "tpu"]
"""`reference` is plain XLA and runs on every device."""


def device_kind() -> str | None:
    """Return the kind of the current mesh's devices, e.g. "cpu", "NVIDIA H200" or "TPU v5p".

    Without a mesh it is None."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.device_kind


def current_backend() -> Backend:
    """Return the backend of the current mesh.

    Devices of an unknown kind get "reference". Without a mesh it is "cpu", whose implementations are plain
    XLA too."""
    kind = device_kind()
    if kind is None or kind == "cpu":
        return "cpu"
    if kind.startswith("TPU"):
        return "tpu"
    return "gpu" if kind.startswith("NVIDIA") else "reference"
