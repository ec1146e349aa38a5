"""Whose weights a sample is asked of: every way to name them.

What the inference routes call a model: a base model, or any sampler of the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Row, select

from ...ckpt import paths
from ...engine import messages
from ..base_models import BaseModels
from ..checkpoints.checkpoints import Checkpoints
from ..errors import BadRequest, NotFound, UnknownModel
from ..ledger.ledger import Ledger
from ..ledger.schema import samplers
from ..models.runs import Runs
from ..models.samplers import LiveSamplers, Sampler, Samplers
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


LISTED = 1000  # samplers


@dataclass(frozen=True)
class ServedModel:
    """`version` names the weights: the last part of their path, or `default` for a base model's."""

    name: str
    sampler: messages.SamplerRef
    version: str = "default"


@dataclass(frozen=True)
class Described:
    """`parent`: the base model of a sampler; `created` in seconds, 0 where it is not known."""

    name: str
    parent: str | None
    created: float = 0.0


class ServedModels:
    """Finds what the inference routes call a model."""

    def __init__(
        self,
        base_models: BaseModels,
        targets: SampleTargets,
        samplers: Samplers,
        runs: Runs,
        ledger: Ledger,
    ):
        self._base_models = base_models
        self._targets = targets
        self._samplers = samplers
        self._runs = runs
        self._ledger = ledger

    async def find(self, owner: str, name: str | None) -> ServedModel:
        """A base model's name (None: the first one), a sampling session's id, the path of sampler weights or
        of a model's live ones, or the last part of such a path: the newest of that name. Raises NotFound."""
        if name is None:
            name = next(iter(self._base_models))
        if name in self._base_models:
            return ServedModel(name, messages.SamplerRef(name))
        if "://" in name:
            version = "live" if name.endswith(LIVE) else name.rpartition("/")[2]
            found = await self._targets.target(owner, SampleFields(model_path=name))
            return ServedModel(name, found.ref, version)
        if ":sample:" in name:
            sampler = await self._samplers.find(owner, name)
            await self._samplers.sampled(sampler)
            return ServedModel(name, sampler.ref, (sampler.model_path or name).rpartition("/")[2])
        row = await self._ledger.read(lambda connection: _newest(connection, owner, name))
        if row is None:
            known = ", ".join(self._base_models)
            raise UnknownModel(
                f"unknown model {name[:192]!r}: name a base model ({known}), a sampling session, the path of "
                "sampler weights, or the last part of one that a sampling session was created with"
            )
        return ServedModel(
            name, messages.SamplerRef(row.base_model, row.directory, row.sampling_engine), name
        )

    async def describe(self, owner: str, name: str) -> Described:
        """What `find` finds, without preparing it for samples. Raises NotFound."""
        if name in self._base_models:
            return Described(name, None)
        if name.endswith(LIVE):
            run = await self._runs.find_trainable(owner, name.removesuffix(LIVE).rpartition("://")[2])
            return Described(name, run.create_message.base_model)
        row = await self._ledger.read(lambda connection: _by_path(connection, owner, name))
        if row is not None:
            return Described(name, row.base_model, row.created_at)
        return Described(name, (await self.find(owner, name)).sampler.base_model)

    async def listed(self, owner: str) -> list[Row]:
        """The caller's samplers of named weights, newest first."""

        def read(connection: Connection) -> list[Row]:
            query = select(samplers).where(samplers.c.owner == owner, samplers.c.model_path.is_not(None))
            return list(connection.execute(query.order_by(samplers.c.created_at.desc()).limit(LISTED)))

        return await self._ledger.read(read)


def _newest(connection: Connection, owner: str, name: str) -> Row | None:
    ends = samplers.c.model_path.endswith(f"/{name}", autoescape=True)
    query = select(samplers).where(samplers.c.owner == owner, ends)
    return connection.execute(query.order_by(samplers.c.created_at.desc()).limit(1)).first()


def _by_path(connection: Connection, owner: str, path: str) -> Row | None:
    query = select(samplers).where(samplers.c.owner == owner, samplers.c.model_path == path)
    return connection.execute(query.order_by(samplers.c.created_at.desc()).limit(1)).first()
