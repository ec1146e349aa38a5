"""Upper bounds on speed from FLOPs and bytes alone (a roofline, doi:10.1145/1498765.1498785).

They assume that products run at the device's peak, that memory is read at full bandwidth, and that
communication is hidden behind computation as far as possible. No program is faster; most are a good deal
slower. Imports no array library.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model.counts import Counts
from .device_catalogue import DEVICES, Device
from .memory import (
    WIDE,
    MemoryPlan,
    Remat,
    Workload,
    exchanged_elements,
    gathered_elements,
    kv_bytes_per_token,
    meshes,
    padded_rank,
)
from .memory import plan as plan_memory


@dataclass(frozen=True)
class Step:
    """FLOPs of forward and backward over a micro-batch, on one device.

    `useful` excludes recomputation; `attention` is part of both.
    """

    useful: float
    executed: float
    useful_products: float  # with weights alone
    executed_products: float


def step_flops(counts: Counts, work: Workload, plan: MemoryPlan) -> Step:
    """Count the FLOPs of a training step over the plan's micro-batch.

    For each element of a matrix a token takes 2 FLOPs forward, 2 for the gradient by the input, and 2 more
    for the gradient by the matrix if it is trained. "attention" and "full" run all forward products but the
    last of each block again; "dots" only those of adapters. Attention has two products forward and five
    backward; kernels for the queries' and the keys' gradients both compute the scores again, which makes it
    seven. "full" runs its forward again too.
    """
    tokens = plan.rows * work.sequence
    adapters = 0 if work.full_weight else counts.active_adapter_per_rank * padded_rank(work.rank)
    trained = counts.matrices + counts.head if work.full_weight else adapters
    products = 4 * (counts.matrices + counts.head) + 2 * trained + 4 * (0 if work.full_weight else adapters)
    again = {
        "none": 0,
        "dots": 2 * adapters,
        "attention": 2 * (counts.matrices - counts.last_matrices + adapters),
        "full": 2 * (counts.matrices - counts.last_matrices + adapters),
    }[plan.remat]
    unit = plan.rows * attention_flops(counts, work.sequence)
    tensor = plan.mesh.tensor
    useful, executed = products * tokens / tensor, (products + again) * tokens / tensor
    attention = 5.5 if plan.remat == "full" else 4.5
    return Step(useful + 3.5 * unit / tensor, executed + attention * unit / tensor, useful, executed)


def attention_flops(counts: Counts, length: int) -> float:
    """Return the FLOPs of the forward of attention over one row: two products over the visible keys."""
    total = 0.0
    for window in counts.windows:
        seen = min(window or length, length)
        keys = length * seen - seen * seen / 2  # summed over queries
        total += 4 * counts.attention_width * keys
    return total


def training_bound(counts: Counts, work: Workload, plan: MemoryPlan, device: Device) -> float:
    """Return the most tokens per second, over all devices, of forward and backward."""
    tokens = plan.rows * work.sequence
    flops = step_flops(counts, work, plan).executed
    passes = 3 if plan.remat in ("attention", "full") else 2
    item, shards = work.itemsize, plan.mesh.tensor
    read = passes * (min(_read(counts, plan), counts.matrices * tokens) + counts.head) * item / shards
    activations = _activation_traffic(counts, plan.remat) * tokens * item / shards
    seconds = max(flops / device.flops, (read + activations) / device.bandwidth)
    if (ways := plan.mesh.fsdp * plan.mesh.expert) > 1:
        others = (counts.parameters - counts.stored) / plan.mesh.tensor
        gathered = 2 * (gathered_elements(counts, plan.mesh) + others) * item * (1 - 1 / ways)
        seconds = max(seconds, gathered / device.interconnect)
    if counts.experts is not None:
        # Tokens travel to the experts, and sums in float32 return; backward, their gradients do. For a
        # recomputation the tokens travel again.
        of_token = 2 * (item + WIDE) + (passes - 2) * item
        exchanged = counts.experts.layers * exchanged_elements(counts, plan.mesh) * tokens
        seconds += exchanged * of_token / device.interconnect
    if plan.mesh.tensor > 1:
        # Two sums over [tokens, hidden] in each block, forward and backward, each a ring of 2 (t - 1) / t.
        ring = 2 * (plan.mesh.tensor - 1) / plan.mesh.tensor
        seconds += 4 * counts.num_layers * tokens * counts.hidden * item * ring / device.interconnect
    return tokens * plan.mesh.row_devices / seconds


def _read(counts: Counts, plan: MemoryPlan) -> int:
    """Return the elements of the layers' matrices that a device reads in one pass, if its tokens get all
    experts that it has."""
    if counts.experts is None:
        return counts.stored
    of_experts = counts.experts.stored
    return counts.stored - of_experts + of_experts // plan.mesh.expert


def _activation_traffic(counts: Counts, remat: Remat) -> float:
    """Return how many elements of activations a token reads and writes at least: the inputs and outputs of
    all products, once in each pass."""
    passes = 3 if remat in ("attention", "full") else 2
    in_and_out = 3 * counts.hidden + counts.qkv + counts.attention_width + 3 * counts.feed_forward
    return passes * counts.num_layers * in_and_out


def decoding_bound(counts: Counts, work: Workload, plan: MemoryPlan, device: Device) -> float:
    """Return the most tokens per second of decoding `plan.slots` sequences of full length.

    Each token reads all weights once for all sequences, and each sequence's keys and values.
    """
    if plan.slots == 0:
        return 0.0
    stored = min(counts.stored, counts.matrices * plan.slots)  # experts that no sequence gets are not read
    weights = (stored + counts.head) * work.itemsize / plan.mesh.shards
    contexts = plan.slots * work.sequence * kv_bytes_per_token(counts, work, plan.mesh)
    flops = 2 * plan.slots * (counts.matrices + counts.head) / plan.mesh.tensor
    return plan.slots / max((weights + contexts) / device.bandwidth, flops / device.flops)


def fastest(counts: Counts, work: Workload, device: Device) -> MemoryPlan:
    """Return the plan on the mesh of all of the device's chips that fits and has the highest bound.

    Among equally fast ones it is the one with the larger KV cache; if none fits, the one that needs the
    least.
    """
    plans = [plan_memory(counts, work, device.memory, mesh) for mesh in meshes(counts, device.count)]
    fitting = [each for each in plans if each.fits]
    if not fitting:
        return min(plans, key=lambda each: each.needed)
    return max(fitting, key=lambda each: (training_bound(counts, work, each, device), each.kv_tokens))


def smallest_slice(counts: Counts, work: Workload, device: Device) -> Device | None:
    """Return the smallest larger slice of the device's kind on which the workload fits."""
    larger = (each for each in DEVICES.values() if each.kind == device.kind and each.count > device.count)
    return next((each for each in larger if fastest(counts, work, each).fits), None)
