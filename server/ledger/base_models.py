"""Rows of base models: which weights each name stands for, so that what was made on others is known."""

from __future__ import annotations

import time
from collections.abc import Mapping

from sqlalchemy import Connection, ScalarSelect, delete, insert, select, update

from .schema import base_models, checkpoints, models, samplers


def record(connection: Connection, digests: Mapping[str, str]) -> None:
    """These models are served from now on. What a ledger without digests has of them was made on them."""
    for name, digest in digests.items():
        connection.execute(delete(base_models).where(base_models.c.name == name))
        connection.execute(insert(base_models).values(name=name, digest=digest, served_at=time.time()))
        for table in (models, samplers, checkpoints):
            unknown = (table.c.base_model == name) & table.c.base_digest.is_(None)
            connection.execute(update(table).where(unknown).values(base_digest=digest))


def digest_of(name: str) -> ScalarSelect:
    """The digest of the model that is served under this name, as a value to insert."""
    return select(base_models.c.digest).where(base_models.c.name == name).scalar_subquery()
