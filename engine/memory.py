"""A plan of a device's memory: what a model, its programs, tenants and samplers take, and what follows from
it.

`plan` chooses what the backward keeps (`remat`), the rows of a micro-batch and the size of the KV cache from
counts of the model (`model.counts`), so it can be made before anything is loaded, and for a device that is
not here. Imports no array library. All sizes are bytes on one device.

The formulas of programs are fitted to what the compilers for H200 and TPUs report for training steps of 8B
and 70B models; `tests/engine/test_memory.py` has the figures, which they meet within 15 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..model.counts import SPARE_ROWS, Counts

Remat = Literal["none", "dots", "attention", "full"]

WIDE = 4  # bytes of the float32 that adapters, gradients and moments are kept in
MODELS_PER_BATCH = 8
SLOTS = 256
PREFILL_TOKENS = 4096
SHORTEST_KV_TOKENS = 16384
"""The KV cache holds at least one sequence of full length, or this many tokens of a longer one."""
FEWEST_STATES, MOST_STATES = 4, 4 * SLOTS
"""For how many sequences and prefixes states are kept, if the model has any."""
KEPT_SHARE = 1 / 4
"""The most of a device's memory that the blocks may keep for the backward, before they recompute more."""
MARGIN = 1 / 20
"""The share of a device's memory that is left free for fragmentation and errors of the formulas."""
SHORTEST_ROW = 512
ROWS_OF_EXPERT = 256

_MOMENTS = {"adamw": 2, "muon": 1, "dimuon": 1, "sgd": 1, "signsgd": 0}
OPTIMIZERS = tuple(_MOMENTS)
KINDS = ("base", "programs", "tenants", "zeros", "sampler_adapters", "kv_pages", "margin")


@dataclass(frozen=True)
class Workload:
    """The models, lengths and batches that have to be held and computed at once.

    `sequence` is the longest row in tokens, `micro_batch` the tokens that each device computes at once (a
    longer row is computed alone), and `chunk` the tokens whose logits exist at once. `itemsize` is that of
    base weights and activations. A tenant is one model in training, which may have a sampler too.
    """

    sequence: int
    tenants: int = 1
    rank: int = 32
    full_weight: bool = False
    optimizer: str = "adamw"
    itemsize: int = 2
    micro_batch: int = 8192
    chunk: int = 1024


@dataclass(frozen=True)
class Mesh:
    """The sizes of the mesh's axes, as in `model.sharding`."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1

    @classmethod
    def of(cls, axes: Mapping[str, int]) -> Mesh:
        return cls(**axes)

    @property
    def devices(self) -> int:
        return self.data * self.shards

    @property
    def shards(self) -> int:
        """The number of devices over which one copy of the base is cut."""
        return self.fsdp * self.expert * self.tensor

    @property
    def row_devices(self) -> int:
        """The number of devices, or groups of them, that compute different rows."""
        return self.data * self.fsdp * self.expert

    def __str__(self) -> str:
        """The mesh in the form of the option `--mesh`."""
        sizes = {"data": self.data, "fsdp": self.fsdp, "expert": self.expert, "tensor": self.tensor}
        return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1)


@dataclass(frozen=True)
class MemoryPlan:
    """The use of each device's memory. `rows` are those of one micro-batch on one device."""

    capacity: int
    mesh: Mesh
    remat: Remat
    rows: int
    sequence: int
    kinds: dict[str, int] = field(default_factory=dict)  # bytes by the names in KINDS
    kv_tokens: int = 0
    needed: int = 0  # with the smallest KV cache

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity

    @property
    def slots(self) -> int:
        """The number of sequences of full length that the KV cache holds, up to the sampler's slots."""
        return min(SLOTS, self.kv_tokens // self.sequence)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one micro-batch over all devices."""
        return self.rows * self.sequence * self.mesh.row_devices


@dataclass(frozen=True)
class StepToCompile:
    """A training step of a plan, with the folder of the model's config.json and the name of the device."""

    folder: str
    device: str
    work: Workload
    mesh: Mesh
    rows: int
    remat: Remat


@dataclass(frozen=True)
class CompiledStep:
    """A compiler's report about a training step: bytes on each device, and the seconds of the compilation."""

    arguments: int
    temporaries: int
    seconds: float


Measured = Mapping[tuple[int, Remat], int]
"""Temporary bytes of training steps that a compiler has reported, by rows on each device and remat."""


def plan(
    counts: Counts, work: Workload, capacity: int, mesh: Mesh | None = None, measured: Measured | None = None
) -> MemoryPlan:
    """Choose the fastest programs that fit beside everything else; the KV cache takes what is left.

    Programs that are not in `measured` are estimated. If nothing fits, the plan has the smallest programs,
    and its `fits` is False.
    """
    mesh = mesh or Mesh()
    kinds = resident(counts, work, mesh)
    kinds["margin"] = int(capacity * MARGIN)
    # a sequence's states count as part of its keys and values
    per_token = kv_bytes_per_token(counts, work, mesh) + state_bytes(counts) // work.sequence
    smallest_kv = min(work.sequence, SHORTEST_KV_TOKENS) * per_token
    beside = sum(kinds.values()) + smallest_kv
    remat: Remat = "full"
    rows = 1
    for rows, remat in _choices(counts, work, capacity, mesh):
        training = (measured or {}).get((rows, remat))
        if training is None:
            training = training_bytes(counts, work, mesh, rows * work.sequence, remat)
        programs = max(training, sampling_bytes(counts, work, mesh))
        if beside + programs <= capacity:
            break
    kinds["programs"] = programs
    needed = beside + programs
    kv_tokens = max(smallest_kv, capacity - needed + smallest_kv) // per_token
    kinds["kv_pages"] = kv_tokens * per_token
    ordered = {name: kinds[name] for name in KINDS}
    return MemoryPlan(capacity, mesh, remat, rows, work.sequence, ordered, kv_tokens, needed)


def longest_row(counts: Counts, work: Workload, capacity: int, mesh: Mesh | None = None) -> int:
    """Return the most tokens of a row whose program fits, up to the workload's; 0 if no row does."""

    def fits(sequence: int) -> bool:
        return plan(counts, replace(work, sequence=sequence), capacity, mesh).fits

    return _most(fits, min(SHORTEST_ROW, work.sequence), work.sequence)


def _most(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Return the largest number from `low` to `high` that fits, by bisection; 0 if none does."""
    most = 0
    while low <= high:
        middle = (low + high) // 2
        if fits(middle):
            most, low = middle, middle + 1
        else:
            high = middle - 1
    return most


def _choices(counts: Counts, work: Workload, capacity: int, mesh: Mesh) -> Iterator[tuple[int, Remat]]:
    """Yield rows on each device and remat, fastest first: no recomputation, then more, then fewer rows."""
    rows = max(1, work.micro_batch // work.sequence)
    for remat in ("none", "dots", "attention"):
        kept = kept_bytes(counts, rows * work.sequence, remat, work.itemsize, mesh.tensor)
        if kept <= capacity * KEPT_SHARE:
            yield rows, remat
    while rows > 1:
        yield rows, "full"
        rows //= 2
    yield 1, "full"


# --- what stays -----------------------------------------------------------------------------------------


def resident(counts: Counts, work: Workload, mesh: Mesh) -> dict[str, int]:
    """Return the bytes of everything on the device between programs except KV pages, by kind."""
    base = counts.parameters * work.itemsize // mesh.shards
    if work.full_weight:
        one = counts.parameters * WIDE // mesh.shards
        sampled = base  # frozen weights have the base's dtype
    else:
        one = adapter_elements(counts, work, mesh) * WIDE
        sampled = adapter_elements(counts, work) * WIDE
    moments = _MOMENTS[work.optimizer]
    # Muon steps embedding, head and norms by AdamW, which has a second moment.
    others = counts.parameters - counts.stored if work.full_weight and "muon" in work.optimizer else 0
    at_once = min(work.tenants, 1 if work.full_weight else MODELS_PER_BATCH)
    stacked = at_once > 1
    return {
        "base": base,
        # weights, gradients and moments
        "tenants": work.tenants * (one * (2 + moments) + others * WIDE // mesh.shards),
        "zeros": at_once * one,  # the initial gradients of a run, kept from one run to the next
        # Each tenant's adapter; in a batch of several tenants, all of them a second time, stacked.
        "sampler_adapters": work.tenants * sampled + (at_once * sampled if stacked else 0),
    }


def adapter_elements(counts: Counts, work: Workload, mesh: Mesh | None = None) -> int:
    """Return the elements of one adapter on all matrices and the head on each device.

    In training on a mesh, the experts' own factors are cut over `expert`, and nothing else is counted as cut.
    """
    per_rank = counts.adapter_per_rank
    if mesh is not None and counts.experts is not None:
        own = counts.experts.adapter_per_rank
        per_rank += own // _experts_ways(counts, mesh) - own
    return per_rank * padded_rank(work.rank)


def _experts_ways(counts: Counts, mesh: Mesh) -> int:
    """Return the number of devices among which the experts of a layer are divided."""
    of = counts.experts
    return mesh.expert if of is not None and of.count % mesh.expert == 0 else 1


def gathered_elements(counts: Counts, mesh: Mesh) -> int:
    """Return the elements of the layers' matrices that a device gathers in one pass over the layers.

    The experts that are divided among devices stay there."""
    if mesh.fsdp * mesh.expert == 1:
        return 0
    of_experts = 0 if counts.experts is None else counts.experts.stored
    gathered, ways = counts.stored - of_experts, _experts_ways(counts, mesh)
    if mesh.fsdp * mesh.expert > ways:
        gathered += of_experts // ways
    return gathered // mesh.tensor


def exchanged_elements(counts: Counts, mesh: Mesh) -> int:
    """Return the elements of other devices' tokens that a device computes with in a mixture, for each of its
    own tokens."""
    return (_experts_ways(counts, mesh) - 1) * counts.hidden


def padded_rank(rank: int) -> int:
    """Return the bucket of a rank: the next power of two, 8 or more (`model.lora.pad_rank`)."""
    return max(8, 1 << (rank - 1).bit_length())


def kv_bytes_per_token(counts: Counts, work: Workload, mesh: Mesh, on_cpu: bool = False) -> int:
    """Return the bytes of one position's keys and values on each device.

    Their heads are cut over `tensor`, and over `fsdp` and `expert` too unless the device is a CPU, as far as
    the axes divide them (`model.kernels.paged_attention.pages.LAYOUTS`).
    """
    ways = 1
    for size in (mesh.tensor,) if on_cpu else (mesh.tensor, mesh.fsdp, mesh.expert):
        if counts.kv_heads % (ways * size) == 0:
            ways *= size
    return counts.kv_per_position * work.itemsize // ways


def state_bytes(counts: Counts) -> int:
    """Return the bytes of one sequence's states."""
    return counts.state_per_sequence * WIDE


# --- what programs take ---------------------------------------------------------------------------------


def kept_elements(counts: Counts, remat: Remat, tensor: int = 1) -> float:
    """Return what one block keeps of one token for the backward.

    With D hidden, F feed-forward, A all heads, and Q queries, keys and values together: "full" D (the block's
    input), "attention" D + A (and attention's output), "dots" 2 D + Q + 2 F + A (and the products with
    weights), "none" 8 D + 2 Q + 5 F.
    """
    D, F, Q = counts.hidden, counts.feed_forward / tensor, counts.qkv / tensor
    A = counts.attention_width / tensor
    return {
        "full": D,
        "attention": D + A,
        "dots": 2 * D + Q + 2 * F + A,
        "none": 8 * D + 2 * Q + 5 * F,
    }[remat]


def kept_bytes(counts: Counts, tokens: int, remat: Remat, itemsize: int, tensor: int = 1) -> int:
    """Return what all blocks keep of `tokens` tokens for the backward."""
    return int(kept_elements(counts, remat, tensor) * counts.num_layers * tokens * itemsize)


def choose_remat(counts: Counts, tokens: int, itemsize: int, limit: int, tensor: int = 1) -> Remat:
    """Return the fastest remat that keeps at most `limit` bytes, or else "full"."""
    for remat in ("none", "dots", "attention"):
        if kept_bytes(counts, tokens, remat, itemsize, tensor) <= limit:
            return remat
    return "full"


def training_bytes(counts: Counts, work: Workload, mesh: Mesh, tokens: int, remat: Remat) -> int:
    """Return the temporaries of a training step over `tokens` tokens on each device.

    What the blocks keep, and the larger of two phases: the backward of one block (about 6 [tokens, F] and 5
    [tokens, D], its weights gathered from all shards, and the new gradients), and the head (the logits of a
    chunk in float32 and their exponentials, the gathered head, and the gradient by the hidden states).
    """
    tensor, item = mesh.tensor, work.itemsize
    block = int((6 * counts.feed_forward / tensor + 5 * counts.hidden) * tokens * item)
    head = work.chunk * counts.vocab_size * (WIDE + item) // tensor + tokens * counts.hidden * item
    block += gathered_elements(counts, mesh) // counts.num_layers * item
    if counts.experts is not None:
        block += _mixture_bytes(counts, mesh, tokens, item)
    if mesh.fsdp * mesh.expert > 1:
        head += counts.head * item // tensor
    if work.full_weight:
        # The matrices in the dtype of the computation, and their gradients in it before they are added up.
        block += 2 * counts.stored * item // mesh.shards
        head += counts.stored * item // mesh.shards + counts.head * (item + WIDE) // mesh.shards
    else:
        block += adapter_elements(counts, work, mesh) * WIDE
    return kept_bytes(counts, tokens, remat, item, tensor) + max(block, head)


def _mixture_bytes(counts: Counts, mesh: Mesh, tokens: int, item: int) -> int:
    """Return what the backward of a mixture takes beside the units of its experts: the tokens in the order of
    experts, with their gradients, and what devices exchange."""
    of, ways = counts.experts, _experts_ways(counts, mesh)
    assert of is not None
    in_order = int(tokens * of.chosen * (SPARE_ROWS if ways > 1 else 1)) * counts.hidden
    exchanged = exchanged_elements(counts, mesh) * tokens
    return in_order * (8 * item + 3 * WIDE) + exchanged * 4 * (item + WIDE)


def sampling_bytes(counts: Counts, work: Workload, mesh: Mesh) -> int:
    """Return the temporaries of the larger of the sampler's programs, prefill and decode."""
    tensor, item = mesh.tensor, work.itemsize
    wide = (3 * counts.feed_forward + 2 * counts.qkv) / tensor + 5 * counts.hidden
    prefill = int(wide * PREFILL_TOKENS * item) + PREFILL_TOKENS * counts.kv_per_position * item // tensor
    decode = 3 * SLOTS * counts.vocab_size * WIDE // tensor
    return max(prefill, decode) + gathered_elements(counts, mesh) // counts.num_layers * item


# --- the engine's own plan ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """A base model that an engine serves: its counts, longest sequence, and item size."""

    counts: Counts
    longest: int
    itemsize: int


@dataclass(frozen=True)
class EnginePlan:
    """The division of each device's memory among what an engine serves.

    `budget` is for models in training, samplers' weights and recycled arrays (`budget.Budget`), `kept` the
    most that the blocks may keep of a micro-batch for its backward. For each base model, `micro_batches` are
    the tokens that a device computes at once, `kv_tokens` the positions in the KV cache, and `states` the
    bytes for states of sequences, which are part of `kv_pages`. `needed` is the least that the engine can
    work with.
    """

    capacity: int
    mesh: Mesh
    base: int
    programs: int
    kv_pages: int
    margin: int
    budget: int
    kept: int
    micro_batches: tuple[int, ...]
    kv_tokens: tuple[int, ...]
    needed: int
    states: tuple[int, ...] = ()

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity

    @property
    def kinds(self) -> dict[str, int]:
        """The bytes by kind. They sum to the capacity, unless it is too small."""
        return {
            "base": self.base,
            "programs": self.programs,
            "kv_pages": self.kv_pages,
            "budget": self.budget,
            "margin": self.margin,
        }

    def __str__(self) -> str:
        parts = ", ".join(f"{name.replace('_', ' ')} {size / 2**30:.2f}" for name, size in self.kinds.items())
        return f"GiB of {self.capacity / 2**30:.2f} on each device: {parts}"


KV_ON_CPU, KEPT_ON_CPU, BUDGET_ON_CPU = 1 << 30, 2 << 30, 3 << 29
"""On a CPU, which shares its memory with everything else, the most that each of these takes."""


def plan_engine(
    models: Sequence[Served],
    capacity: int,
    mesh: Mesh | None = None,
    *,
    on_cpu: bool = False,
    kv_cache_tokens: int | None = None,
) -> EnginePlan:
    """Divide `capacity` bytes of each device among the base models that are served.

    Programs get what the fastest micro-batch of each model takes, and its longest row that half of the
    memory beside the base has room for. What is left is for KV caches (unless `kv_cache_tokens` says how
    many positions each has) and the budget, half and half. Where sequences have states, these get half of a
    cache's share, up to four times the sampler's slots.
    """
    mesh = mesh or Mesh()
    works = [_engine_workload(each, on_cpu) for each in models]
    base = sum(each.counts.parameters * each.itemsize for each in models) // mesh.shards
    margin = 0 if on_cpu else int(capacity * MARGIN)
    per_token = [kv_bytes_per_token(m.counts, w, mesh, on_cpu) for m, w in zip(models, works, strict=True)]
    least_kv = [
        (kv_cache_tokens or min(each.longest, SHORTEST_KV_TOKENS)) * size
        for each, size in zip(models, per_token, strict=True)
    ]
    one_state = [state_bytes(each.counts) for each in models]
    least_states = [FEWEST_STATES * size for size in one_state]
    least_programs = max(_least_programs(m, w, mesh) for m, w in zip(models, works, strict=True))
    least_budget = max(
        3 * WIDE * adapter_elements(m.counts, w, mesh) for m, w in zip(models, works, strict=True)
    )
    least_cache = sum(least_kv) + sum(least_states)
    needed = base + margin + least_cache + least_programs + least_budget
    room = max(0, capacity - base - margin)
    if on_cpu:
        kept, micro_batches = min(KEPT_ON_CPU, room // 4), tuple(work.micro_batch for work in works)
        programs = max(least_programs, kept)
        most_kv, budget = min(KV_ON_CPU, room // 4), min(BUDGET_ON_CPU, room // 4)
    else:
        beside = least_cache + least_budget
        kept, programs, micro_batches = _programs_of_accelerator(models, works, mesh, room - beside)
        programs = max(least_programs, programs)
        most_kv = budget = max(0, room - programs) // 2
    more = max(0, most_kv - least_cache) // len(models)
    states = tuple(
        min(least + more // 2, MOST_STATES * size)
        for least, size in zip(least_states, one_state, strict=True)
    )
    kv_tokens = tuple(
        (least_kv[i] + (0 if kv_cache_tokens else more - (states[i] - least_states[i]))) // size
        for i, size in enumerate(per_token)
    )
    kv_pages = sum(states) + sum(t * size for t, size in zip(kv_tokens, per_token, strict=True))
    if not on_cpu:
        budget = max(0, room - programs - kv_pages)
    return EnginePlan(
        capacity,
        mesh,
        base,
        programs,
        kv_pages,
        margin,
        max(budget, least_budget),
        kept,
        micro_batches,
        kv_tokens,
        needed,
        states,
    )


def _engine_workload(served: Served, on_cpu: bool) -> Workload:
    """Return the workload of one micro-batch, as the trainer chooses it (`training.trainer`)."""
    tokens, chunk = (micro_batch_on_cpu(served.counts), 256) if on_cpu else (8192, 1024)
    sequence = min(served.longest, tokens)
    return Workload(sequence, tenants=1, itemsize=served.itemsize, micro_batch=tokens, chunk=chunk)


def micro_batch_on_cpu(counts: Counts) -> int:
    """Return the tokens that a CPU computes at once in training.

    They are 1,024, or more if an expert would get few rows on average: its matrices are read from memory once
    for all of them."""
    of = counts.experts
    tokens = 0 if of is None else ROWS_OF_EXPERT * of.count // of.chosen
    return min(max(1024, 1 << max(0, tokens - 1).bit_length()), 4096)


def _least_programs(served: Served, work: Workload, mesh: Mesh) -> int:
    tokens = min(SHORTEST_ROW, work.sequence)
    return training_bytes(served.counts, work, mesh, tokens, "full")


def _programs_of_accelerator(
    models: Sequence[Served], works: Sequence[Workload], mesh: Mesh, room: int
) -> tuple[int, int, tuple[int, ...]]:
    """Return the most that blocks may keep, the memory of the programs (of the `room` for them), and the
    tokens of each model's micro-batches."""
    kept = programs = 0
    micro_batches = []
    for served, work in zip(models, works, strict=True):
        of, item = served.counts, work.itemsize
        tokens = work.micro_batch
        while tokens > SHORTEST_ROW and training_bytes(of, work, mesh, tokens, "full") > room:
            tokens //= 2
        micro_batches.append(tokens)
        remat = choose_remat(of, tokens, item, int(room * KEPT_SHARE), mesh.tensor)
        kept = max(kept, kept_bytes(of, tokens, remat, item, mesh.tensor))

        def fits(length: int, of: Counts = of, work: Workload = work) -> bool:
            return training_bytes(of, work, mesh, length, "full") <= room / 2

        longest = _most(fits, min(tokens, served.longest), served.longest)
        programs = max(
            programs,
            training_bytes(of, work, mesh, tokens, remat),
            training_bytes(of, work, mesh, longest, "full") if longest else 0,
            min(room, sampling_bytes(of, work, mesh)),
        )
    return kept, programs, tuple(micro_batches)


# --- which devices would do -----------------------------------------------------------------------------


def meshes(counts: Counts, devices: int) -> list[Mesh]:
    """Return the meshes of so many devices that divide the model's heads and experts."""
    experts = 1 if counts.experts is None else counts.experts.count
    found = []
    for tensor in _powers_of_two(devices):
        if counts.kv_heads % tensor or devices % tensor:
            continue
        for expert in _powers_of_two(devices // tensor):
            if experts % expert or (devices // tensor) % expert:
                continue
            rest = devices // tensor // expert
            found += [
                Mesh(rest // fsdp, fsdp, tensor, expert) for fsdp in _powers_of_two(rest) if rest % fsdp == 0
            ]
    return found


def _powers_of_two(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        size *= 2


def enough_devices(counts: Counts, work: Workload, capacity: int, most: int = 512) -> Mesh | None:
    """Return the smallest mesh over `fsdp` on which the workload fits; None if it needs more than `most`."""
    for devices in _powers_of_two(most):
        mesh = Mesh(fsdp=devices)
        if plan(counts, work, capacity, mesh).fits:
            return mesh
    return None


def most_tenants(counts: Counts, work: Workload, capacity: int, mesh: Mesh) -> int:
    """Return how many of the workload's tenants fit."""

    def fits(tenants: int) -> bool:
        return plan(counts, replace(work, tenants=tenants), capacity, mesh).fits

    return _most(fits, 1, work.tenants)


def refusal(counts: Counts, work: Workload, planned: MemoryPlan) -> str:
    """Say what a plan that does not fit needs, and what would help."""
    enough = enough_devices(counts, work, planned.capacity)
    here = planned.mesh.devices
    remedy = ""
    if enough is not None and enough.devices > here:
        remedy = f"; {number(enough.devices)} of them with --mesh {enough} would do"
    elif enough is not None and enough.devices > 1 and enough.shards > planned.mesh.shards:
        remedy = f"; --mesh {replace(enough, data=here // enough.devices)} would do"
    return needs(planned) + remedy + less(counts, work, planned)


def needs(planned: MemoryPlan) -> str:
    """Say how much memory a plan needs, mostly for what, and how much there is."""
    kinds = {name: size for name, size in planned.kinds.items() if name != "kv_pages"}
    largest = sorted(kinds, key=lambda name: -kinds[name])[:2]
    parts = " and ".join(f"{in_gb(kinds[name])} for {_NAMES[name]}" for name in largest)
    of_each = "" if planned.mesh.devices == 1 else " on each device"
    return f"needs {in_gb(planned.needed)}{of_each} ({parts}), this device has {in_gb(planned.capacity)}"


def less(counts: Counts, work: Workload, planned: MemoryPlan) -> str:
    """Say how many tenants, or how long rows, would fit; nothing if none do."""
    if fewer := most_tenants(counts, work, planned.capacity, planned.mesh):
        return f"; {fewer} models in training instead of {work.tenants} would fit"
    if shorter := longest_row(counts, work, planned.capacity, planned.mesh):
        return f"; rows of at most {shorter:,} tokens would fit"
    return ""


def number(count: int) -> str:
    """Return a number of devices as text."""
    return {2: "two", 4: "four", 8: "eight"}.get(count, str(count))


_NAMES = {
    "base": "the base model",
    "programs": "the largest program",
    "tenants": "models in training",
    "zeros": "gradients under way",
    "sampler_adapters": "samplers' weights",
    "margin": "a margin",
}


def in_gb(size: float) -> str:
    """Return a size as text, in GB (10⁹ bytes), the unit in which devices are sold."""
    return f"{size / 1e9:.0f} GB" if size >= 10e9 else f"{size / 1e9:.1f} GB"
