"""Whose weights a sample is asked of: every way to name them."""

from __future__ import annotations

from dataclasses import dataclass

from ...ckpt import paths
from ...engine import messages
from ..base_models import BaseModels
from ..checkpoints.checkpoints import Checkpoints
from ..errors import BadRequest, NotFound
from ..models.live_samplers import LiveSamplers
from ..models.runs import Runs
from ..models.samplers import Sampler, Samplers
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


@dataclass(frozen=True)
class Target:
    """The weights that a request samples, and the sampling session that it names, if any."""

    ref: messages.SamplerRef
    session: Sampler | None = None


class SampleTargets:
    """Finds the weights that requests ask samples of."""

    def __init__(
        self,
        base_models: BaseModels,
        runs: Runs,
        checkpoints: Checkpoints,
        samplers: Samplers,
        live_samplers: LiveSamplers,
    ):
        self._base_models = base_models
        self._runs = runs
        self._checkpoints = checkpoints
        self._samplers = samplers
        self._live_samplers = live_samplers

    async def weights(
        self,
        owner: str,
        base_model: str | None,
        model_path: str | None,
        model_id: str | None = None,
    ) -> Weights:
        """`model_path` may be less than a URI if `model_id` says whose it is. Raises BadRequest, or
        NotFound."""
        if model_path is None:
            if base_model is None:
                raise BadRequest("give base_model or model_path")
            return Weights(self._base_models.named(base_model).name)
        run = None if model_id is None else await self._runs.find(owner, model_id)
        checkpoint = await self._checkpoints.find_sampleable(owner, model_path, run.id if run else None)
        if run is not None and checkpoint.run_id != run.id:
            raise BadRequest(f"model_id: {model_path!r} is not a checkpoint of {model_id!r}")
        if base_model is not None and base_model != checkpoint.base_model:
            raise BadRequest(f"base_model: {model_path!r} was trained from {checkpoint.base_model!r}")
        name = self._base_models.named(checkpoint.base_model).name
        uri = paths.CheckpointUri(checkpoint.run_id, checkpoint.segment, checkpoint.name)
        return Weights(name, checkpoint.directory, str(uri), checkpoint.run_id)

    async def target(self, owner: str, body: SampleFields) -> Target:
        """Raises BadRequest, or NotFound."""
        if body.sampling_session_id is not None:
            session = await self._samplers.find(owner, body.sampling_session_id)
            await self._samplers.sampled(session)
            return Target(session.ref, session)
        live = body.model_id
        if body.model_path is not None and body.model_path.endswith(LIVE):
            live = body.model_path.removesuffix(LIVE).rpartition("://")[2]
        if live is not None:
            return Target((await self.live_sampler(owner, live)).ref)
        if body.base_model is None and body.model_path is None:
            raise BadRequest("give sampling_session_id, model_id, model_path or base_model: whose samples?")
        found = await self.weights(owner, body.base_model, body.model_path)
        return Target(messages.SamplerRef(found.base_model, weights=found.directory))

    async def live_sampler(self, owner: str, name: str) -> Sampler:
        """Of a model as it is now. Raises NotFound for one that cannot be sampled."""
        run = await self._runs.find_trainable(owner, name)
        if run.configuration.get("train_only"):
            raise NotFound(f"model {run.name!r} has no sampler: it was created with debug_train_only")
        return await self._live_samplers.of(run)
