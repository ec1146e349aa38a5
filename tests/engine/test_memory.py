"""Plans of memory and arithmetic, against compilers' figures, the arrays themselves and known formulas."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from tinsmith.engine import device_catalogue, memory, roofline
from tinsmith.engine.memory import Mesh, Workload
from tinsmith.engine.optimizers import optimizer_families
from tinsmith.engine.programs import Programs
from tinsmith.model import decoder, kv_cache
from tinsmith.model.config import ModelConfig
from tinsmith.model.counts import counts
from tinsmith.model.families import FAMILIES
from tinsmith.model.folder import read_config
from tinsmith.model.kernels.paged_attention.pages import LAYOUTS
from tinsmith.model.lora import RANK_BUCKETS, init_lora, logical_axes, pad_rank
from tinsmith.model.sharding import MESH_AXES, make_mesh, partition_spec
from tiny_models import write_model

GIB = 2**30


def config(model_type: str, **sizes) -> ModelConfig:
    common = {"model_type": model_type, "rope_theta": 1e6, "max_position_embeddings": 131072, "head_dim": 128}
    return FAMILIES[model_type].read(common | sizes)


QWEN3_8B = config(
    "qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
    num_attention_heads=32, num_key_value_heads=8,
)  # fmt: skip
LLAMA_70B = config(
    "llama", vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8,
)  # fmt: skip
TINY_SIZES = {
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY = config(**TINY_SIZES)
MIXTURE_SIZES = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
}  # fmt: skip
MIXTURE = config(**MIXTURE_SIZES)
"""The shape of Qwen3-30B-A3B."""
SLIDING, FULL = "sliding_attention", "full_attention"
C8, C70 = counts(QWEN3_8B), counts(LLAMA_70B)
K32 = 32768

# Steps in docs/accelerators.json: LoRA of rank 32 on all matrices and the head, a row of T tokens per device.
COMPILED = [
    (C8, Mesh(), 8192, "full", "h200", "step:model=8b,length=8192"),
    (C8, Mesh(), K32, "full", "h200", "step:model=8b,length=32768"),
    (C8, Mesh(), 131072, "full", "h200", "step:model=8b,length=131072"),
    (C8, Mesh(), 8192, "attention", "h200", "step:model=8b,length=8192,remat=attention"),
    (C8, Mesh(), 8192, "dots", "h200", "step:model=8b,length=8192,remat=dots"),
    (C70, Mesh(fsdp=8), 8192, "full", "h200x8", "step:model=70b,length=8192,fsdp=8,rows=8"),
    (
        counts(MIXTURE),
        Mesh(expert=8),
        8192,
        "full",
        "h200x8",
        "step:model=30b-a3b,expert=8,rows=8,length=8192",
    ),
    (
        counts(MIXTURE),
        Mesh(expert=4),
        8192,
        "full",
        "v5p-8",
        "step:model=30b-a3b,expert=4,rows=4,length=8192",
    ),
    (C8, Mesh(fsdp=4), 8192, "full", "v5p-8", "step:model=8b,length=8192,fsdp=4,rows=4"),
    (C8, Mesh(tensor=4), 8192, "full", "v5p-8", "step:model=8b,length=8192,tensor=4"),
    (C70, Mesh(fsdp=8), 8192, "full", "v5p-16", "step:model=70b,length=8192,fsdp=8,rows=8"),
    (C8, Mesh(fsdp=8), 8192, "full", "v6e-8", "step:model=8b,length=8192,fsdp=8,rows=8"),
    (C8, Mesh(fsdp=16), 8192, "full", "v5e-16", "step:model=8b,length=8192,fsdp=16,rows=16"),
]
FIGURES = json.loads((Path(__file__).parents[2] / "docs" / "accelerators.json").read_text())


@pytest.mark.parametrize(("of", "mesh", "tokens", "remat", "target", "case"), COMPILED)
def test_estimates_are_within_15_percent_of_what_compilers_report(of, mesh, tokens, remat, target, case):
    work = Workload(tokens)
    held = memory.resident(of, work, mesh)
    arguments = (
        held["base"] + 2 * memory.adapter_elements(of, work, mesh) * memory.WIDE
    )  # adapter and gradients
    total = arguments + memory.training_bytes(of, work, mesh, tokens, remat)
    assert total == pytest.approx(FIGURES[target][case]["total"], rel=0.15)


@pytest.mark.parametrize(("full_weight", "mib"), [(False, 363.1 + 209.5), (True, 1268.2 + 586.0)])
def test_estimates_hold_for_full_weights_and_small_models_too(full_weight, mib):
    """They are compared with jax 0.12.0.1's figures for this step on an H200, with XLA's attention over a row
    of 1024."""
    sizes = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8}
    of = counts(config("qwen3", num_attention_heads=8, num_key_value_heads=4, **sizes))
    work = Workload(1024, full_weight=full_weight)
    one = of.parameters if full_weight else memory.adapter_elements(of, work)
    arguments = 2 * one * memory.WIDE + (0 if full_weight else of.parameters * 2)
    total = arguments + memory.training_bytes(of, work, Mesh(), 1024, "full")
    assert total / 2**20 == pytest.approx(mib, rel=0.15)


def test_flops_are_those_counted_in_compiled_programs():
    """The numbers are TFLOP for 8B at 8k: products of the model, of the program that recomputes all, and of
    "dots"."""
    work = Workload(8192)
    planned = memory.plan(C8, work, 1 << 50)
    full, dots = (roofline.step_flops(C8, work, replace(planned, remat=r)) for r in ("full", "dots"))
    assert full.useful_products / 1e12 == pytest.approx(252.5, rel=0.01)
    assert full.executed_products / 1e12 == pytest.approx(338.0, rel=0.01)
    assert dots.executed_products / 1e12 == pytest.approx(253.9, rel=0.01)
    for length, tflop in ((8192, 19.8), (K32, 317), (131072, 5067)):
        assert roofline.attention_flops(C8, length) / 1e12 == pytest.approx(tflop, rel=0.01)


def test_a_window_bounds_the_keys_that_are_counted():
    windowed = counts(
        config(**TINY_SIZES, use_sliding_window=True, sliding_window=4, layer_types=[SLIDING, FULL, SLIDING])
    )
    of_layer = [sum(min(query + 1, window) for query in range(100)) for window in (4, 100, 4)]
    width = TINY.layers[0].mixer.heads * TINY.layers[0].mixer.head_dim
    # The diagonal counts half, as in a kernel's triangle.
    assert roofline.attention_flops(windowed, 100) == pytest.approx(4 * width * sum(of_layer), rel=0.02)


def test_counts_are_those_of_the_arrays():
    base = decoder.build(TINY, "float32")[1]
    of = counts(TINY)
    assert of.parameters == sum(leaf.size for leaf in jax.tree.leaves(base))
    assert of.matrices == sum(leaf.size for leaf in jax.tree.leaves(base["layers"]) if leaf.ndim == 3)
    adapter = jax.eval_shape(lambda: init_lora(TINY, 0, 5))
    assert memory.adapter_elements(of, Workload(8, rank=5)) == sum(x.size for x in jax.tree.leaves(adapter))
    work = Workload(8, itemsize=2)
    assert memory.kv_bytes_per_token(of, work, Mesh()) == kv_cache.bytes_per_token(TINY, "bfloat16")
    assert memory.kv_bytes_per_token(of, work, Mesh(), on_cpu=True) == kv_cache.bytes_per_token(
        TINY, "bfloat16"
    )
    assert [memory.padded_rank(rank) for rank in range(1, 513)] == [pad_rank(rank) for rank in range(1, 513)]
    assert RANK_BUCKETS[-1] == 512


@pytest.mark.parametrize(
    ("mesh", "on_cpu", "ways"),
    [
        (Mesh(fsdp=8), False, 8),
        (Mesh(fsdp=4, tensor=2), False, 8),
        (Mesh(fsdp=16), False, 1),  # 16 devices do not divide 8 heads: each has all of them
        (Mesh(fsdp=8, tensor=2), False, 2),
        (Mesh(fsdp=4, tensor=2), True, 2),
        (Mesh(fsdp=2, expert=4), False, 8),
    ],
)
def test_keys_and_values_are_counted_as_their_heads_are_cut(mesh, on_cpu, ways):
    """They follow the rules of the pages' own axes, with JAX's description of a mesh of those sizes."""
    sizes = vars(mesh)
    axes = LAYOUTS["cpu" if on_cpu else "gpu"][0]
    shape = tuple(C8.kv_heads if "heads" in axis else 1 for axis in axes)
    cut = partition_spec(shape, axes, AbstractMesh(tuple(sizes.values()), tuple(sizes)))
    names = next(part for part, axis in zip(cut, axes, strict=True) if "heads" in axis) or ()
    assert math.prod(sizes[name] for name in ([names] if isinstance(names, str) else names)) == ways
    of_all = memory.kv_bytes_per_token(C8, Workload(8), Mesh())
    assert memory.kv_bytes_per_token(C8, Workload(8), mesh, on_cpu) == of_all // ways


@pytest.mark.parametrize("name", memory.OPTIMIZERS)
def test_moments_are_those_that_the_optimizer_keeps(name):
    weights = jax.eval_shape(lambda: init_lora(TINY, 0, 8, train_unembed=False))
    state = optimizer_families.family(name).new_state(0, lambda: weights)
    kept = sum(leaf.size for leaf in jax.tree.leaves(state) if hasattr(leaf, "size"))
    one = sum(leaf.size for leaf in jax.tree.leaves(weights))
    tenants = memory.resident(counts(TINY), Workload(8, rank=8, optimizer=name), Mesh())["tenants"]
    per_tree = memory.adapter_elements(counts(TINY), Workload(8, rank=8)) * memory.WIDE
    assert kept / one == tenants / per_tree - 2  # beside weights and gradients
    assert set(memory.OPTIMIZERS) == set(optimizer_families.FAMILIES)


@pytest.mark.parametrize("name", memory.OPTIMIZERS)
def test_moments_of_full_weights(name):
    base = decoder.build(TINY, "float32")[1]
    state = optimizer_families.family(name).new_state(0, lambda: base)
    kept = sum(leaf.size for leaf in jax.tree.leaves(state) if hasattr(leaf, "size"))
    work = Workload(8, full_weight=True, optimizer=name)
    tenants = memory.resident(counts(TINY), work, Mesh())["tenants"] // memory.WIDE
    assert tenants - 2 * counts(TINY).parameters == kept


def test_the_largest_program_is_what_the_compiler_says():
    programs = Programs(make_mesh())
    matrix = jax.ShapeDtypeStruct((64, 64), "float32")
    for name, function in (("small", lambda x: x + 1), ("large", lambda x: (x @ x) @ (x.T @ x))):
        compiled = programs.get(name, name, function, (matrix,))
    assert programs.largest_bytes == compiled.memory_analysis().temp_size_in_bytes > 0


@pytest.mark.parametrize("of", [C8, C70, counts(TINY)])
@pytest.mark.parametrize("tenants", [0, 1, 20])
@pytest.mark.parametrize("sequence", [2048, 8192, K32])
@pytest.mark.parametrize("device", ["h200", "h100x8", "v5e-16", "v5p-8", "a100-40"])
def test_a_plan_never_gives_away_more_than_there_is(of, tenants, sequence, device):
    found = device_catalogue.find(device)
    work = Workload(sequence, tenants=tenants)
    for mesh in memory.meshes(of, found.count):
        planned = memory.plan(of, work, found.memory, mesh)
        assert mesh.devices == found.count
        assert set(planned.kinds) == set(memory.KINDS)
        assert all(size >= 0 for size in planned.kinds.values())
        assert planned.fits == (sum(planned.kinds.values()) <= found.memory)
        assert planned.kv_tokens >= min(sequence, memory.SHORTEST_KV_TOKENS)


def test_with_less_memory_more_is_recomputed_and_then_fewer_rows_are_computed():
    work, base = Workload(1024), memory.resident(C8, Workload(1024), Mesh())["base"]
    chosen = [memory.plan(C8, work, base + spare * GIB) for spare in (600, 100, 16, 7)]
    assert [each.remat for each in chosen] == ["none", "dots", "attention", "full"]
    assert [each.rows for each in chosen][:3] == [8, 8, 8]
    assert chosen[3].rows < 8
    assert all(each.fits for each in chosen)


def test_more_memory_never_fits_less():
    work = Workload(8192, tenants=4)
    plans = [memory.plan(C8, work, size * GIB) for size in range(16, 160, 4)]
    assert [each.fits for each in plans] == sorted(each.fits for each in plans)


def test_a_refusal_says_what_is_needed_and_what_would_do():
    work = Workload(8192)
    capacity = 24 * 10**9
    planned = memory.plan(C8, work, capacity)
    assert not planned.fits
    text = memory.refusal(C8, work, planned)
    assert "this device has 24 GB; two of them with --mesh fsdp=2 would do" in text
    assert f"needs {memory.in_gb(planned.needed)} (16 GB for the base model" in text
    assert memory.plan(C8, work, capacity, Mesh(fsdp=2)).fits


def test_a_refusal_names_fewer_tenants_or_shorter_rows_where_these_would_do():
    capacity = 36 * GIB
    many = Workload(8192, tenants=50)
    text = memory.refusal(C8, many, memory.plan(C8, many, capacity))
    fewer = memory.most_tenants(C8, many, capacity, Mesh())
    assert 1 <= fewer < 50
    assert f"{fewer} models in training instead of 50 would fit" in text
    assert memory.plan(C8, replace(many, tenants=fewer), capacity).fits
    long = Workload(131072)
    shorter = memory.longest_row(C8, long, capacity)
    assert f"rows of at most {shorter:,} tokens would fit" in memory.refusal(
        C8, long, memory.plan(C8, long, capacity)
    )
    assert memory.plan(C8, replace(long, sequence=shorter), capacity).fits
    assert not memory.plan(C8, replace(long, sequence=shorter + 8), capacity).fits


@pytest.mark.parametrize(("rows_of", "at_least"), [(2048, 14_000), (8192, 11_000), (K32, 6_500)])
def test_the_bound_of_an_8b_step_on_an_h200(rows_of, at_least):
    h200, work = device_catalogue.find("h200"), Workload(rows_of)
    planned = roofline.fastest(C8, work, h200)
    assert planned.fits
    bound = roofline.training_bound(C8, work, planned, h200)
    executed = roofline.step_flops(C8, work, planned).executed
    assert at_least <= bound <= planned.micro_batch_tokens * h200.flops / executed * (1 + 1e-9)
    if rows_of <= 8192:
        assert planned.remat == "dots"
        step = roofline.step_flops(C8, work, planned)
        assert step.useful_products / step.executed_products >= 0.95


def test_decoding_is_bound_by_the_bytes_that_it_reads():
    h200, work = device_catalogue.find("h200"), Workload(8192)
    planned = roofline.fastest(C8, work, h200)
    matrices = sum(site.into * site.out for layer in QWEN3_8B.layers for site in layer.sites)
    weights = 2 * (matrices + 151936 * 4096)
    keys_and_values = planned.slots * 8192 * kv_cache.bytes_per_token(QWEN3_8B, "bfloat16")
    seconds = (weights + keys_and_values) / 4.8e12
    assert roofline.decoding_bound(C8, work, planned, h200) == pytest.approx(planned.slots / seconds)


def test_devices_by_their_names():
    find = device_catalogue.find
    assert [find(name).count for name in ("h200", "h200x8", "v5e-16", "v6e-8", "v5p-8", "v5p-16")] == [
        1, 8, 16, 8, 4, 8,
    ]  # fmt: skip
    assert find("A100") == find("a100-80")
    assert find("a100x4") == find("a100-80x4")
    assert find("v5litepod-16") == find("v5e-16")
    assert find("v5p").name == "v5p-8"
    assert find("v5p-8").topology == "v5p:2x2x1"
    assert find("h200x16").topology == "1x2x8"
    names = ("h200x8", "h200x16", "v5e-8", "v5e-16", "v6e-8", "v5p-8", "v5p-16")
    assert [find(name).machines for name in names] == [1, 2, 1, 4, 1, 1, 2]
    for device in device_catalogue.DEVICES.values():
        chips = math.prod(int(size) for size in device.topology.rpartition(":")[2].split("x"))
        assert chips == device.count
    with pytest.raises(ValueError, match=r"'h20' \(did you mean h200\?\); known: h200, .*v5e-16"):
        find("h20")


def served(of=C8, longest=K32, itemsize=2) -> memory.Served:
    return memory.Served(of, longest, itemsize)


@pytest.mark.parametrize(
    "models", [[served()], [served(), served(counts(TINY), 512)], [served(longest=131072)]]
)
@pytest.mark.parametrize("gib", [24, 40, 80, 128])
def test_an_engine_s_plan_uses_all_of_the_memory_and_no_more(models, gib):
    planned = memory.plan_engine(models, gib * GIB)
    assert planned.fits
    assert sum(planned.kinds.values()) == pytest.approx(gib * GIB, rel=0.01)
    for each, tokens in zip(models, planned.kv_tokens, strict=True):
        assert tokens >= min(each.longest, memory.SHORTEST_KV_TOKENS)
    assert planned.base == sum(each.counts.parameters * 2 for each in models)
    assert planned.budget >= 3 * 4 * memory.adapter_elements(C8, Workload(8))


def test_an_engine_has_room_for_the_micro_batches_that_it_chooses():
    planned = memory.plan_engine([served()], 128 * GIB)
    work = Workload(8192)
    remat = memory.choose_remat(C8, 8192, 2, planned.kept)
    assert remat == "dots"
    assert memory.training_bytes(C8, work, Mesh(), 8192, remat) <= planned.programs
    remat = memory.choose_remat(C8, K32, 2, planned.kept)
    assert remat == "attention"
    assert memory.training_bytes(C8, work, Mesh(), K32, remat) <= planned.programs
    small = memory.plan_engine([served()], 32 * GIB)
    assert memory.choose_remat(C8, 8192, 2, small.kept) == "full"
    assert (planned.micro_batches, small.micro_batches) == ((8192,), (8192,))
    for gib in range(21, 32):
        (tokens,) = memory.plan_engine([served()], gib * GIB).micro_batches
        least = memory.plan_engine([served()], gib * GIB)
        assert 512 <= tokens <= 8192
        assert memory.training_bytes(C8, work, Mesh(), tokens, "full") <= least.programs
    assert memory.plan_engine([served()], 21 * GIB).micro_batches < (8192,)


def test_positions_that_the_operator_wants_are_planned_for():
    planned = memory.plan_engine([served(), served(counts(TINY))], 80 * GIB, kv_cache_tokens=100_000)
    assert planned.kv_tokens == (100_000, 100_000)
    per_token = sum(kv_cache.bytes_per_token(each, "bfloat16") for each in (QWEN3_8B, TINY))
    assert planned.kv_pages == 100_000 * per_token
    assert not memory.plan_engine([served()], 24 * GIB, kv_cache_tokens=10**6).fits


def test_shards_of_a_mesh_make_a_model_fit():
    assert not memory.plan_engine([served(C70)], 80 * GIB).fits
    assert memory.plan_engine([served(C70)], 80 * GIB, Mesh(fsdp=4)).fits


def test_latent_attention_stores_one_key_for_all_heads_and_no_value(tmp_path):
    """DeepSeek-V2's paper, arXiv:2405.04434: (kv_lora_rank + qk_rope_head_dim) numbers in each layer."""
    of = read_config(write_model(tmp_path, "deepseek_v3", kv_lora_rank=24, qk_rope_head_dim=8))
    assert counts(of).kv_per_position == 32 * of.num_layers
    for backend in LAYOUTS:
        cache = jax.eval_shape(lambda b=backend: kv_cache.make_cache(of, 5, 16, "bfloat16", backend=b))
        stored = sum(math.prod(x.shape) for x in jax.tree.leaves(cache.parts))
        assert stored == 5 * 16 * 32 * of.num_layers


def test_a_mixture_of_experts_is_stored_whole_and_computed_in_part():
    """Qwen3-30B-A3B, by its model card: 30.5 billion parameters, of which 3.3 are active for a token."""
    of = counts(MIXTURE)
    assert of.parameters / 1e9 == pytest.approx(30.5, abs=0.05)
    assert (of.matrices + 2 * of.head) / 1e9 == pytest.approx(3.35, abs=0.05)
    h200 = device_catalogue.find("h200")
    planned = roofline.fastest(of, Workload(8192), h200)
    assert planned.fits
    assert planned.kinds["base"] == 2 * of.parameters
    step = roofline.step_flops(of, Workload(8192), planned)
    assert step.useful_products == pytest.approx(4 * 8192 * (of.matrices + of.head), rel=0.1)


def test_experts_that_are_divided_among_devices_stay_there():
    """Arrays lie as the plan says, and no device gathers its experts; adapters are cut with the experts."""
    of, axes = counts(MIXTURE), {"expert": 8}
    assert of.experts is not None
    plain, divided = Mesh(fsdp=8), Mesh.of(axes)
    mesh = AbstractMesh(tuple(vars(divided)[name] for name in MESH_AXES), MESH_AXES)
    adapter = jax.eval_shape(lambda: init_lora(MIXTURE, 0, 8))

    def held_of(x, axes):
        return math.prod(NamedSharding(mesh, partition_spec(x.shape, axes, mesh)).shard_shape(x.shape))

    on_device = jax.tree.map(held_of, adapter, logical_axes(adapter, MIXTURE))
    held = memory.adapter_elements(of, Workload(8192, rank=8), divided)
    assert held == sum(jax.tree.leaves(on_device))
    assert memory.resident(of, Workload(8192), divided)["base"] == 2 * of.parameters // 8
    assert memory.gathered_elements(of, plain) == of.stored
    assert memory.gathered_elements(of, divided) == of.stored - of.experts.stored
    assert memory.gathered_elements(of, Mesh(fsdp=2, expert=4)) == of.stored - of.experts.stored * 3 // 4
    # Of short micro-batches, tokens are less to move than experts.
    work, device = Workload(1024, micro_batch=1024), device_catalogue.find("h200x8")
    bounds = [
        roofline.training_bound(of, work, memory.plan(of, work, device.memory, each), device)
        for each in (plain, divided)
    ]
    assert bounds[1] > bounds[0]


def test_micro_batches_on_a_cpu_grow_with_the_experts():
    assert memory.micro_batch_on_cpu(C8) == 1024
    assert memory.micro_batch_on_cpu(counts(MIXTURE)) == 4096
    few = replace(MIXTURE_FIELDS, num_experts=16, num_experts_per_tok=4) if False else None
    assert few is None
