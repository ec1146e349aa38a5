"""What the inference routes call a model: a base model, or any sampler of the caller's."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Row, select

from ...engine import messages
from ..base_models import BaseModels
from ..errors import UnknownModel
from ..ledger.ledger import Ledger
from ..ledger.schema import samplers
from ..models.runs import Runs
from ..models.samplers import Samplers
from ..wire.sampling import SampleFields
from .sample_targets import LIVE, SampleTargets

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
