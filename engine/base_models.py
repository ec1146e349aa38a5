"""The base models that the engine has loaded: weights on the devices, a trainer and a sampler over them."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..ckpt import tokenizer_files
from ..ckpt.token_bytes import TokenBytes
from ..model import decoder
from ..model.config import ModelConfig
from ..model.folder import digest, read_config
from ..model.load import find_model, load_base
from ..model.weight_files import WeightsError
from . import messages
from .device_memory import device_share
from .sampling.sampler import Sampler, default_kv_cache_tokens
from .sampling.sampler_cache import SamplerCache
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


def compute_dtype(name: str) -> Any:
    """The dtype of base weights and activations; "auto" is float32 on CPUs and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def load(declared: messages.BaseModel, engine: messages.EngineConfig, mesh: Mesh) -> BaseModel:
    """Read a base model onto the mesh.

    Raises FileNotFoundError, UnsupportedModelError or WeightsError for what cannot be loaded.
    """
    began = time.perf_counter()
    folder = find_model(declared.path)
    config = read_config(folder)
    if declared.digest is not None and digest(folder, config) != declared.digest:
        raise WeightsError(
            f"the files of model {declared.name!r} in {folder} have changed since the server started: start "
            "the server again to serve what is there now"
        )
    dtype = compute_dtype(engine.dtype)
    graph, _ = decoder.build(config, dtype)
    weights = load_base(folder, config, dtype, mesh)
    limit = min(config.max_sequence_length, engine.max_sequence_length or config.max_sequence_length)
    trainer = Trainer(graph, weights, config, mesh, max_sequence_length=limit)

    token_bytes = _token_bytes(folder)
    sharing = len(engine.base_models)  # what is derived from the device is for all of them
    kv_cache_tokens = engine.kv_cache_tokens or max(
        default_kv_cache_tokens(config, dtype, limit) // sharing, min(limit, 16384)
    )

    def new_sampler() -> Sampler:
        return Sampler(
            graph,
            trainer.base,
            config,
            token_bytes=token_bytes,
            end_tokens=tokenizer_files.end_tokens(folder),
            mesh=mesh,
            kv_cache_tokens=kv_cache_tokens,
            max_sequence_length=limit,
        )

    samplers = SamplerCache(
        new_sampler,
        config,
        Path(engine.data_dir),
        dtype,
        mesh,
        engine.sampler_bytes or device_share(1 / 8, on_cpu=2**30) // sharing,
        engine.sampler_idle_seconds,
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
    )


def _token_bytes(folder: Path) -> TokenBytes | None:
    try:
        return TokenBytes.from_folder(folder)
    except FileNotFoundError:
        log.warning("%s has no tokenizer.json: stop strings cannot be used with it", folder.name)
        return None
