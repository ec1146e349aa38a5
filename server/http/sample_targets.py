"""Whose weights a sample is asked of: every way to name them."""

from __future__ import annotations

from dataclasses import dataclass

from ...ckpt import paths
from ...engine import messages
from ..backend import Backend
from ..errors import BadRequest, NotFound
from ..models.samplers import Sampler
from ..wire.sampling import SampleFields

LIVE = "/weights/live"
"""The end of the path of a model's weights as they are now."""


@dataclass(frozen=True)
class Weights:
    """A base model, and what is on top of it: `directory` is that of the weights, if any, `path` their
    canonical URI, `run_id` the model that they are of."""

    base_model: str
    directory: str | None = None
    path: str | None = None
    run_id: str | None = None


async def weights(
    backend: Backend,
    owner: str,
    base_model: str | None,
    model_path: str | None,
    model_id: str | None = None,
) -> Weights:
    """`model_path` may be less than a URI if `model_id` says whose it is. Raises BadRequest, or NotFound."""
    if model_path is None:
        if base_model is None:
            raise BadRequest("give base_model or model_path")
        return Weights(backend.base_model(base_model).name)
    run = None if model_id is None else await backend.runs.find(owner, model_id)
    checkpoint = await backend.checkpoints.find_sampleable(owner, model_path, run.id if run else None)
    if run is not None and checkpoint.run_id != run.id:
        raise BadRequest(f"model_id: {model_path!r} is not a checkpoint of {model_id!r}")
    if base_model is not None and base_model != checkpoint.base_model:
        raise BadRequest(f"base_model: {model_path!r} was trained from {checkpoint.base_model!r}")
    name = backend.base_model(checkpoint.base_model).name
    uri = paths.CheckpointUri(checkpoint.run_id, checkpoint.segment, checkpoint.name)
    return Weights(name, checkpoint.directory, str(uri), checkpoint.run_id)


@dataclass(frozen=True)
class Target:
    """The weights that a request samples, and the sampling session that it names, if any."""

    ref: messages.SamplerRef
    session: Sampler | None = None


async def target(backend: Backend, owner: str, body: SampleFields) -> Target:
    """Raises BadRequest, or NotFound."""
    if body.sampling_session_id is not None:
        session = await backend.samplers.find(owner, body.sampling_session_id)
        await backend.samplers.sampled(session)
        return Target(session.ref, session)
    live = body.model_id
    if body.model_path is not None and body.model_path.endswith(LIVE):
        live = body.model_path.removesuffix(LIVE).rpartition("://")[2]
    if live is not None:
        return Target((await live_sampler(backend, owner, live)).ref)
    if body.base_model is None and body.model_path is None:
        raise BadRequest("give sampling_session_id, model_id, model_path or base_model: whose samples?")
    found = await weights(backend, owner, body.base_model, body.model_path)
    return Target(messages.SamplerRef(found.base_model, weights=found.directory))


async def live_sampler(backend: Backend, owner: str, name: str) -> Sampler:
    """Of a model as it is now. Raises NotFound for one that cannot be sampled."""
    run = await backend.runs.find_trainable(owner, name)
    if run.configuration.get("train_only"):
        raise NotFound(f"model {run.name!r} has no sampler: it was created with debug_train_only")
    return await backend.live_samplers.of(backend, run)
