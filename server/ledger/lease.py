"""The row that says which server owns the ledger.

Every owner has a generation of its own, one more than the last owner's. Each transaction of a server compares
the row with its generation, so a server that another one has replaced writes nothing and reads nothing. An
owner renews its lease every few seconds. One that has not for `EXPIRY_SECONDS` can be replaced, and so can
one whose process is seen to have ended.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Connection, func, select, update

from .ownership import EXPIRY_SECONDS, Holder, InUse, in_use
from .schema import lease

RENEWAL_SECONDS = EXPIRY_SECONDS / 4


@dataclass(frozen=True)
class Lease:
    generation: int


def _now(connection: Connection) -> float:
    """By the database's clock, where several machines share it."""
    if connection.dialect.name == "postgresql":
        return float(connection.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one())
    return time.time()


def acquire(
    connection: Connection, holder: Holder, unlocked: bool, renewed_at: float | None
) -> Lease | float:
    """Own the ledger from now on; or, if its holder may be alive, when that one renewed its lease last.

    `unlocked`: nobody else has the ledger's file. `renewed_at` is what an earlier call returned: raises InUse
    for a holder that has renewed its lease since then.
    """
    row = connection.execute(select(lease).with_for_update()).one()
    now = _now(connection)
    known = Holder.of(row.holder)
    if known is not None and not unlocked and not known.has_ended() and now - row.renewed_at < EXPIRY_SECONDS:
        if renewed_at is not None and row.renewed_at > renewed_at:
            raise InUse(in_use("the ledger", known, other="TINSMITH_DATABASE_URL"))
        return float(row.renewed_at)
    generation = row.generation + 1
    connection.execute(update(lease).values(generation=generation, holder=holder.values(), renewed_at=now))
    return Lease(generation)


def is_held(connection: Connection, generation: int) -> bool:
    """Whether this is still the owner's generation. In a transaction that writes, it stays so to its end."""
    query = "SELECT generation FROM lease"
    if connection.dialect.name == "postgresql" and connection.get_execution_options().get("writes", False):
        query += " FOR SHARE"
    return connection.exec_driver_sql(query).scalar() == generation


def renew(connection: Connection, generation: int) -> bool:
    """Whether it was still held."""
    mine = update(lease).where(lease.c.generation == generation)
    return connection.execute(mine.values(renewed_at=_now(connection))).rowcount == 1


def release(connection: Connection, generation: int) -> None:
    connection.execute(update(lease).where(lease.c.generation == generation).values(holder=None))


def ledger_id(connection: Connection) -> str:
    """What tells this ledger from every other one."""
    return connection.execute(select(lease.c.ledger)).scalar_one()
