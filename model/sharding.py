"""Sharding of arrays: one mesh, and one table from logical to mesh axes.

Every parameter names its logical axes (`decoder.logical_axes`), and activations name theirs where they are
constrained. To shard differently, edit RULES.

Mesh axes: `data` (copies of the weights, rows of the batch), `fsdp` (shards of both weights and rows),
`expert` (the same, but the experts of a mixture are divided among its devices and stay there: tokens travel
to them), `tensor` (heads, hidden units of the MLP and the vocabulary).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "expert", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp", "expert"),
    "sequences": ("data",),
    "tokens": (),
    "pages": (),
    "positions": (),
    "layers": (),
    "embed": ("fsdp", "expert"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "cached_heads": ("tensor", "fsdp", "expert"),
    "head_dim": (),
    "ff": ("tensor",),
    "summed_heads": ("tensor", "fsdp", "expert"),
    "summed_ff": ("tensor", "fsdp", "expert"),
    "experts": ("expert",),
    "hidden": (),
}
"""From logical axis to mesh axes. `embed` is the hidden axis of a weight, `hidden` that of an activation.

`summed_heads` and `summed_ff` are the first axes of the matrices that end in the hidden axis. Those are cut
over `fsdp` there and not at `embed`, so that the shards of a layer's matrix lie one after the other: to
gather along its second axis, XLA would first copy the whole stack of layers into another order.

`sequences` are rows that are cut over `data` alone; `cached_heads` are of decoding on accelerators, where
weights stay where they are."""

WITHOUT_FSDP = {"embed": "hidden", "summed_heads": "heads", "summed_ff": "ff"}
"""The axes of whole matrices, and of adapters, where those of matrices are cut over `fsdp`."""

LogicalAxes = tuple[str, ...]


def make_mesh(axes: dict[str, int] | None = None) -> Mesh:
    """Make a mesh of all local and remote devices, from e.g. {"fsdp": 4, "tensor": 2}. Missing axes have size
    1.

    None is one device. Raises ValueError if the sizes do not match the number of devices.
    """
    sizes = dict.fromkeys(MESH_AXES, 1) | (axes or {})
    if unknown := set(sizes) - set(MESH_AXES):
        raise ValueError(f"unknown mesh axes {sorted(unknown)}; known: {', '.join(MESH_AXES)}")
    needed, devices = math.prod(sizes.values()), jax.devices()
    if needed > len(devices) or (axes and needed != len(devices)):
        raise ValueError(f"the mesh {sizes} needs {needed} devices, and there are {len(devices)}")
    shape = tuple(sizes[name] for name in MESH_AXES)
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=devices[:needed])


def partition_spec(shape: tuple[int, ...], axes: LogicalAxes, mesh: Any) -> PartitionSpec:
    """Apply the rules to one array.

    A mesh axis is used for the first dimension that names it and that it divides."""
    cut: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    for size, logical in zip(shape, axes, strict=True):
        names: tuple[str, ...] = ()
        for name in RULES[logical]:
            ways = mesh.shape.get(name, 1)
            if ways > 1 and size % ways == 0 and name not in used:
                names, size = (*names, name), size // ways
        used.update(names)
        cut.append(names or None)
    return PartitionSpec(*cut)


def row_devices(mesh: Any) -> int:
    """Return the number of devices, or groups of them, that compute different rows of a batch."""
    return math.prod(mesh.shape.get(name, 1) for name in RULES["rows"])


def shardings_for(abstract: Any, logical: Any, mesh: Mesh) -> Any:
    """Return a NamedSharding for every leaf of `abstract` (arrays or ShapeDtypeStructs).

    `logical` is the same tree with a tuple of logical axis names at each leaf (`decoder.logical_axes`).
    """

    def leaf(x: Any, axes: LogicalAxes) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(x.shape, axes, mesh))

    return jax.tree.map(leaf, abstract, logical)


def shardings_of(tree: Any) -> Any:
    """Return the sharding of each array (or ShapeDtypeStruct) of a tree."""
    return jax.tree.map(lambda x: x.sharding, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of scalars, outputs, and adapters in the sampler: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of a batch array of `shape` whose first axis is rows."""
    axes = ("rows", *("tokens",) * (len(shape) - 1))
    return NamedSharding(mesh, partition_spec(shape, axes, mesh))


def constrain(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Shard an activation by the rules in a program compiled under `jax.set_mesh`; otherwise return x."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes, mesh))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(w: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Gather a matrix over `fsdp` in a program, once for the product with it and for that product's gradient.

    Left to themselves, TPU compilers gather some matrices for each of the two. The gradient of the matrix is
    cut like the matrix itself."""
    return constrain(w, tuple(WITHOUT_FSDP.get(axis, axis) for axis in axes))


gathered.defvjp(lambda w, axes: (gathered(w, axes), None), lambda axes, _, dw: (constrain(dw, axes),))
