"""Sampling sessions: immutable weights under an id that clients sample from."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Row

from ..ckpt import paths
from ..engine import messages
from .errors import BadRequest, NotFound
from .ledger import tenancy
from .ledger.ledger import Ledger


@dataclass(frozen=True)
class Sampler:
    id: str
    owner: str
    base_model: str
    model_path: str | None
    directory: str | None

    @property
    def ref(self) -> messages.SamplerRef:
        return messages.SamplerRef(self.base_model, weights=self.directory)


def sampler_id(session_id: str, sampling_session_seq_id: int) -> str:
    return f"{session_id}:sample:{sampling_session_seq_id}"


def _sampler(row: Row) -> Sampler:
    return Sampler(row.id, row.owner, row.base_model, row.model_path, row.directory)


class Samplers:
    def __init__(self, ledger: Ledger, data_dir: Path):
        self._ledger = ledger
        self._data_dir = data_dir
        self._samplers: dict[str, Sampler] = {}

    async def create(
        self,
        owner: str,
        session_id: str,
        seq_id: int,
        base_model: str,
        model_path: str | None,
        directory: str | None,
    ) -> Sampler:
        """The first one of this number stays: asking again with the same weights finds it."""
        identifier = sampler_id(session_id, seq_id)

        def change(connection: Connection) -> Row:
            if tenancy.find_sampler(connection, identifier) is None:
                add(connection, owner, session_id, identifier, base_model, model_path, directory)
            row = tenancy.find_sampler(connection, identifier)
            assert row is not None
            return row

        sampler = _sampler(await self._ledger.write(change))
        if (sampler.base_model, sampler.model_path) != (base_model, model_path):
            raise BadRequest(
                f"sampling_session_seq_id {seq_id} of this session has other weights; use the next number"
            )
        self._samplers[identifier] = sampler
        return sampler

    async def find(self, owner: str, identifier: str) -> Sampler:
        """Raises NotFound for what does not exist or is not the owner's."""
        sampler = self._samplers.get(identifier)
        if sampler is None:
            row = await self._ledger.read(lambda connection: tenancy.find_sampler(connection, identifier))
            if row is not None:
                sampler = self._samplers[identifier] = _sampler(row)
        if sampler is None or sampler.owner != owner:
            raise NotFound(f"unknown sampling session {identifier!r}: create one first")
        return sampler

    async def forget_unnamed(self, session_id: str) -> None:
        """Weights that only a sampling session names go with their session."""
        gone = await self._ledger.write(
            lambda connection: tenancy.delete_unnamed_samplers(connection, session_id)
        )
        for row in gone:
            self._samplers.pop(row.id, None)
            directory = paths.resolve(self._data_dir, row.directory)
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


def add(
    connection: Connection,
    owner: str,
    session_id: str,
    identifier: str,
    base_model: str,
    model_path: str | None,
    directory: str | None,
) -> None:
    tenancy.add_sampler(
        connection,
        id=identifier,
        owner=owner,
        session_id=session_id,
        base_model=base_model,
        model_path=model_path,
        directory=directory,
    )
