"""Base models that the engine has loaded: weights on the devices, a trainer and a sampler over them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..ckpt import tokenizer_files
from ..ckpt.token_bytes import TokenBytes
from ..model import decoder
from ..model.config import Attention, Latent, ModelConfig
from ..model.counts import counts
from ..model.folder import digest, read_config
from ..model.kernels.attention import why_reference
from ..model.kernels.product import Form
from ..model.load import find_model, load_base
from ..model.sharding import row_devices
from ..model.weight_files import WeightsError
from . import messages, processor
from .budget import Budget
from .device_memory import capacity_bytes
from .memory import EnginePlan, Served, plan_engine
from .memory import Mesh as MeshSizes
from .sampling.sampler import Sampler
from .sampling.sampler_cache import SamplerCache
from .training.custom_loss_processes import CustomLossProcesses
from .training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass
class BaseModel:
    """A loaded base model. All models in training and all samplers on it share its weights."""

    name: str
    folder: Path
    config: ModelConfig
    mesh: Mesh
    dtype: Any
    graph: Any
    trainer: Trainer
    samplers: SamplerCache
    reference: str
    memory: EngineMemory


def compute_dtype(name: str) -> Any:
    """Return the dtype of base weights and activations; "auto" is float32 on CPUs and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


@dataclass(frozen=True)
class EngineMemory:
    """The division of the device's memory: the plan, the folder of each base model in it, and the budget."""

    plan: EnginePlan
    folders: tuple[Path, ...]
    budget: Budget

    @classmethod
    def of(cls, engine: messages.EngineConfig, mesh: Mesh) -> EngineMemory:
        """Plan with what is free now, from the base models' configs. Names of one folder share a model."""
        folders = tuple(dict.fromkeys(find_model(declared.path) for declared in engine.base_models))
        itemsize = compute_dtype(engine.dtype).itemsize
        configs = [read_config(folder) for folder in folders]
        served = [Served(counts(config), _limit(config, engine), itemsize) for config in configs]
        plan = plan_engine(
            served,
            capacity_bytes(mesh.size),
            MeshSizes.of(mesh.shape),
            on_cpu=mesh.devices.flat[0].platform == "cpu",
            kv_cache_tokens=engine.kv_cache_tokens,
        )
        return cls(plan, folders, Budget(plan.budget))


def _limit(config: ModelConfig, engine: messages.EngineConfig) -> int:
    return min(config.max_sequence_length, engine.max_sequence_length or config.max_sequence_length)


def product_form(dtype: Any, mesh: Mesh) -> Form:
    """Return the form of a decoder's products that suits the devices."""
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    return Form.WIDE_SUMS if is_cpu and dtype == jnp.bfloat16 and processor.has_amx() else Form.PLAIN


def _log_missing_kernels(name: str, config: ModelConfig, dtype: Any, mesh: Mesh) -> None:
    """Warn if attention runs the reference instead of the devices' kernel, and say why."""
    mixers = {layer.mixer for layer in config.layers if isinstance(layer.mixer, Attention | Latent)}
    with jax.set_mesh(mesh):
        reasons = {why_reference(mixer.width // mixer.heads, dtype) for mixer in mixers}
    for reason in sorted(filter(None, reasons)):
        log.warning("%s: attention in plain XLA, which is right but slower: %s", name, reason)


def load(
    declared: messages.BaseModel,
    engine: messages.EngineConfig,
    mesh: Mesh,
    memory: EngineMemory | None = None,
    custom_losses: CustomLossProcesses | None = None,
    loaded: Callable[[int, int], object] = lambda so_far, total: None,
) -> BaseModel:
    """Read a base model onto the mesh, within its share of `memory` (by default all of the engine's).

    All base models of an engine share one `custom_losses`. `loaded` is called now and then with the bytes of
    weights so far and of all. Raises FileNotFoundError, UnsupportedModelError or
    WeightsError for a model that cannot be loaded.
    """
    began = time.perf_counter()
    memory = memory or EngineMemory.of(engine, mesh)
    folder = find_model(declared.path)
    config = read_config(folder)
    if declared.digest is not None and digest(folder, config) != declared.digest:
        raise WeightsError(
            f"the files of model {declared.name!r} in {folder} have changed since the server started: start "
            "the server again to serve what is there now"
        )
    dtype = compute_dtype(engine.dtype)
    graph, _ = decoder.build(config, dtype, product_form(dtype, mesh))
    weights = load_base(folder, config, dtype, mesh, loaded)
    limit, number = _limit(config, engine), memory.folders.index(folder)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    trainer = Trainer(
        graph,
        weights,
        config,
        mesh,
        max_sequence_length=limit,
        micro_batch_tokens=None if on_cpu else memory.plan.micro_batches[number] * row_devices(mesh),
        budget=memory.budget,
        kept_bytes=memory.plan.kept,
        custom_loss_processes=custom_losses,
    )
    token_bytes = _token_bytes(folder)

    def new_sampler() -> Sampler:
        return Sampler(
            graph,
            trainer.base,
            config,
            token_bytes=token_bytes,
            end_tokens=tokenizer_files.end_tokens(folder),
            mesh=mesh,
            kv_cache_tokens=memory.plan.kv_tokens[number],
            state_bytes=memory.plan.states[number],
            max_sequence_length=limit,
            budget=memory.budget,
        )

    samplers = SamplerCache(
        new_sampler,
        config,
        Path(engine.data_dir),
        dtype,
        mesh,
        engine.sampler_bytes,
        engine.sampler_idle_seconds,
        memory.budget,
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    log.info(
        "%s: %s, %d layers, %.1f MB as %s, up to %d tokens; loaded in %.1f s",
        declared.name,
        config.family,
        config.num_layers,
        size / 1e6,
        dtype.name,
        limit,
        time.perf_counter() - began,
    )
    _log_missing_kernels(declared.name, config, dtype, mesh)
    return BaseModel(
        declared.name,
        folder,
        config,
        mesh,
        dtype,
        graph,
        trainer,
        samplers,
        declared.reference or declared.name,
        memory,
    )


def _token_bytes(folder: Path) -> TokenBytes | None:
    try:
        return TokenBytes.from_folder(folder)
    except FileNotFoundError:
        log.warning("%s has no tokenizer.json: stop strings cannot be used with it", folder.name)
        return None
