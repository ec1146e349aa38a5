"""Finds the weights that a request for samples means, by every name that the APIs have for them."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Row, select

from ...ckpt import paths
from ...engine import messages
from ..base_models import BaseModels
from ..checkpoints import Checkpoints
from ..errors import BadRequest, NotFound, UnknownModel
from ..ledger.ledger import Ledger
from ..ledger.schema import samplers
from ..models.runs import Runs
from ..models.samplers import LiveSamplers, Sampler, Samplers
from ..wire.sample_requests import SampleFields

LIVE = "/weights/live"
"""The end of the path of a model's weights as they are now."""
LISTED = 1000  # samplers


@dataclass(frozen=True)
class Weights:
    """A base model, and the weights on top of it: their directory if there are any, their canonical URI
    (`path`), and the model that they belong to (`run_id`)."""

    base_model: str
    directory: str | None = None
    path: str | None = None
    run_id: str | None = None


@dataclass(frozen=True)
class Target:
    """The weights that a request samples, and the sampling session that it names, if any."""

    ref: messages.SamplerRef
    session: Sampler | None = None


@dataclass(frozen=True)
class ServedModel:
    """A model as OpenAI's and SGLang's clients name it. `version` names its weights: the last part of their
    path, or `default` for a base model's."""

    name: str
    sampler: messages.SamplerRef
    version: str = "default"


@dataclass(frozen=True)
class Described:
    """A model in a listing. `parent`: the base model of a sampler; `created` in seconds, 0 if not known."""

    name: str
    parent: str | None
    created: float = 0.0


@dataclass(frozen=True)
class SampleTargets:
    """Finds weights for the Tinker API's fields, and models for the names that OpenAI's clients use."""

    base_models: BaseModels
    ledger: Ledger
    runs: Runs
    checkpoints: Checkpoints
    samplers: Samplers
    live_samplers: LiveSamplers

    async def weights(
        self, owner: str, base_model: str | None, model_path: str | None, model_id: str | None = None
    ) -> Weights:
        """Find the weights at `model_path`, which may be a part of a URI if `model_id` names the model.

        Without a path: a base model's own. Raises BadRequest, or NotFound.
        """
        if model_path is None:
            if base_model is None:
                raise BadRequest("give base_model or model_path")
            return Weights(self.base_models.named(base_model).name)
        run = None if model_id is None else await self.runs.find(owner, model_id)
        checkpoint = await self.checkpoints.find_sampleable(owner, model_path, run.id if run else None)
        if run is not None and checkpoint.run_id != run.id:
            raise BadRequest(f"model_id: {model_path!r} is not a checkpoint of {model_id!r}")
        if base_model is not None and base_model != checkpoint.base_model:
            raise BadRequest(f"base_model: {model_path!r} was trained from {checkpoint.base_model!r}")
        name = self.base_models.named(checkpoint.base_model).name
        uri = paths.CheckpointUri(checkpoint.run_id, checkpoint.segment, checkpoint.name)
        return Weights(name, checkpoint.directory, str(uri), checkpoint.run_id)

    async def target(self, owner: str, body: SampleFields) -> Target:
        """Find the weights that a body of `asample` or `sample` names. Raises BadRequest, or NotFound."""
        if body.sampling_session_id is not None:
            session = await self._opened(owner, body.sampling_session_id)
            return Target(session.ref, session)
        live = body.model_id
        if body.model_path is not None and body.model_path.endswith(LIVE):
            live = _live_model(body.model_path)
        if live is not None:
            return Target((await self.live_sampler(owner, live)).ref)
        if body.base_model is None and body.model_path is None:
            raise BadRequest("give sampling_session_id, model_id, model_path or base_model: whose samples?")
        found = await self.weights(owner, body.base_model, body.model_path)
        return Target(messages.SamplerRef(found.base_model, weights=found.directory))

    async def live_sampler(self, owner: str, name: str) -> Sampler:
        """Return a sampler of a model's weights as they are now. Raises NotFound if it has none."""
        run = await self.runs.find_trainable(owner, name)
        if run.configuration.get("train_only"):
            raise NotFound(f"model {run.name!r} has no sampler: it was created with debug_train_only")
        return await self.live_samplers.of(run)

    async def named(self, owner: str, name: str | None) -> ServedModel:
        """Find a model by the name that a request gives it. Raises NotFound.

        A name is a base model's (None: the first one), a sampling session's id, the path of sampler weights
        or of a model's live weights, or the last part of such a path, which means the newest of that name.
        """
        if name is None:
            name = next(iter(self.base_models))
        if name in self.base_models:
            return ServedModel(name, messages.SamplerRef(name))
        if "://" in name:
            version = "live" if name.endswith(LIVE) else name.rpartition("/")[2]
            return ServedModel(name, (await self.target(owner, SampleFields(model_path=name))).ref, version)
        if ":sample:" in name:
            sampler = await self._opened(owner, name)
            return ServedModel(name, sampler.ref, (sampler.model_path or name).rpartition("/")[2])
        row = await self._newest(owner, samplers.c.model_path.endswith(f"/{name}", autoescape=True))
        if row is None:
            known = ", ".join(self.base_models)
            raise UnknownModel(
                f"unknown model {name[:192]!r}: name a base model ({known}), a sampling session, the path of "
                "sampler weights, or the last part of one that a sampling session was created with"
            )
        return ServedModel(
            name, messages.SamplerRef(row.base_model, row.directory, row.sampling_engine), name
        )

    async def describe(self, owner: str, name: str) -> Described:
        """Describe what `named` finds, without preparing it for samples. Raises NotFound."""
        if name in self.base_models:
            return Described(name, None)
        if name.endswith(LIVE):
            run = await self.runs.find_trainable(owner, _live_model(name))
            return Described(name, run.create_message.base_model)
        row = await self._newest(owner, samplers.c.model_path == name)
        if row is not None:
            return Described(name, row.base_model, row.created_at)
        return Described(name, (await self.named(owner, name)).sampler.base_model)

    async def listed(self, owner: str) -> list[Row]:
        """Return the caller's samplers of named weights, newest first."""
        query = select(samplers).where(samplers.c.owner == owner, samplers.c.model_path.is_not(None))
        query = query.order_by(samplers.c.created_at.desc()).limit(LISTED)
        return await self.ledger.read(lambda connection: list(connection.execute(query)))

    async def _opened(self, owner: str, session_id: str) -> Sampler:
        session = await self.samplers.find(owner, session_id)
        await self.samplers.sampled(session)
        return session

    async def _newest(self, owner: str, condition: ColumnElement[bool]) -> Row | None:
        query = select(samplers).where(samplers.c.owner == owner, condition)
        query = query.order_by(samplers.c.created_at.desc()).limit(1)
        return await self.ledger.read(lambda connection: connection.execute(query).first())


def _live_model(path: str) -> str:
    return path.removesuffix(LIVE).rpartition("://")[2]
