"""The sweep: regular removal of expired answers, and of directories that the ledger does not need.

The ledger is changed before the disk, so a crash in between leaves directories that no row names; they are
removed after the next start. Nothing is removed that an operation, a replay or a live sampler may still read,
nor anything of models that the ledger does not know, because it may be the wrong ledger.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from ...engine import messages
from ..errors import ApiError
from ..ledger import accounts, retention, step_metrics
from ..ledger.ledger import Ledger
from ..ledger.ownership import sqlite_file
from ..operations.operation import Operation
from ..operations.payloads import Payloads
from ..settings import Settings
from ..supervision.supervisor import Supervisor

log = logging.getLogger("tinsmith.sweep")

# The names that Orbax and `ckpt.atomic` give to directories while they write them.
_UNFINISHED = re.compile(r"(\.orbax-checkpoint-tmp[^/]*|\.tmp-[0-9a-f]{32})$")
_MOST_AUDITED = 500_000  # entries of a tenant in the audit log
_ROWS_OF_RESTING_RUNS = 256  # of step metrics
_RUNS_AT_A_TIME = 1000
KINDS = ("ledger", "checkpoints", "snapshots", "samplers")


@dataclass(eq=False)
class Sweep:
    """Removes expired answers, deleted checkpoints, and directories that nothing needs.

    `used_bytes`: by kind, measured by each sweep and counted in between. `being_written`: directories of
    snapshots that the ledger does not name yet. `on_removed` gets the directories of removed checkpoints.
    """

    ledger: Ledger
    engine: Supervisor
    payloads: Payloads
    settings: Settings
    being_written: Collection[str]
    on_removed: Callable[[str], None]
    used_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0), init=False)

    def written(self, operation: Operation) -> None:
        """Count the bytes that an answered operation has saved."""
        match operation.answer:
            case messages.Done(output=messages.StateSaved() | messages.SamplerSaved() as output):
                kind = "samplers" if operation.kind == "save_unnamed_sampler" else "checkpoints"
                self.used_bytes[kind] += output.size_bytes

    def snapshot_written(self, size_bytes: int) -> None:
        self.used_bytes["snapshots"] += size_bytes

    async def sweep(self) -> None:
        """Remove everything that has expired or is not needed any more.

        Raises ApiError, SQLAlchemyError or OSError; the next sweep continues there.
        """
        await self._drop_answers()
        await self._drop_accounts()
        await self._thin_step_metrics()
        await self._remove_snapshots()
        await self.remove_checkpoints()
        # Last, because directories of models that the ledger no longer knows are left alone.
        before = time.time() - self.settings.ended_model_seconds
        await self._repeat(partial(retention.drop_ended_models, before=before))
        self.used_bytes = await asyncio.to_thread(self._measure)

    async def sweep_forever(self) -> None:
        while True:
            try:
                await self.sweep()
            except (ApiError, SQLAlchemyError, OSError) as error:
                log.error("the disk could not be swept: %s", error)
            await asyncio.sleep(self.settings.sweep_seconds)

    # --- the ledger

    async def _drop_answers(self) -> None:
        now = time.time()
        through = now - self.settings.answer_seconds
        await self.payloads.forget_ended_models()
        await self.payloads.remove_unused()
        await self._repeat(partial(retention.drop_answers, through=through))
        await self._repeat(partial(retention.drop_operations, through=through, now=now))
        await self._drop_answers_beyond_shares(now)

    async def _drop_answers_beyond_shares(self, now: float) -> None:
        """Drop answers of the owners with the most bytes, if all answers take too many."""
        sizes = await self.ledger.read(retention.answer_bytes)
        if sum(sizes.values()) <= self.settings.answer_bytes:
            return
        share = retention.fair_share(sizes.values(), self.settings.answer_bytes)
        for owner in (owner for owner, size in sizes.items() if size > share):
            through = await self.ledger.read(retention.beyond, owner=owner, max_bytes=share)
            if through is not None:
                await self._repeat(partial(retention.drop_answers, owner=owner, through=through))
                await self._repeat(partial(retention.drop_operations, through=through, now=now, owner=owner))

    async def _repeat(self, change: Callable[[Connection], int]) -> None:
        """Call `change` until it finds nothing left to change, letting other writes in between."""
        while await self.ledger.write(change):
            await asyncio.sleep(0)

    async def _drop_accounts(self) -> None:
        now = time.time()
        await self._repeat(partial(accounts.drop_audit_entries, before=now - self.settings.audit_seconds))
        for owner in await self.ledger.read(accounts.owners_of_long_audit_logs, most=_MOST_AUDITED):
            await self._repeat(partial(accounts.drop_oldest_audit_entries, owner=owner, most=_MOST_AUDITED))
        await self.ledger.write(accounts.drop_usage, before=now - self.settings.usage_seconds)

    async def _thin_step_metrics(self) -> None:
        most = self.settings.step_metrics_bytes
        for owner in await self.ledger.read(step_metrics.crowded, most_bytes=most):
            await self._repeat(partial(step_metrics.thin_owner, owner=owner, most_bytes=most))
        before = time.time() - self.settings.step_metrics_seconds
        resting = partial(
            step_metrics.resting, before=before, most_rows=_ROWS_OF_RESTING_RUNS, limit=_RUNS_AT_A_TIME
        )
        for model_id in await self.ledger.read(resting):
            await self.ledger.write(step_metrics.thin, model_id=model_id, most_rows=_ROWS_OF_RESTING_RUNS)

    # --- directories

    async def _remove_snapshots(self) -> None:
        # In this order: a directory that is recorded in between was listed as being written.
        found = await asyncio.to_thread(self._directories, "snapshots/*/*")
        found = await self._of_known_models(found)
        needed = set(self.being_written)
        needed |= await self.ledger.read(retention.snapshots)
        await self._remove(key for key in found if key not in needed and _finished_name(key) not in needed)

    async def remove_checkpoints(self) -> None:
        """Remove directories of deleted, overwritten, failed and expired checkpoints, and those without
        rows."""
        found = await asyncio.to_thread(self._directories, "checkpoints/*/*/*")
        now = time.time()
        dead = await self.ledger.read(retention.dead_checkpoints, now=now)
        live = await self.ledger.read(retention.live_checkpoints, now=now)
        found = await self._of_known_models(found)
        orphans = [key for key in found if key not in live and live.get(_finished_name(key), True)]
        if not dead and not orphans:
            return
        needed = await self.ledger.read(retention.directories_to_load)
        silent_since = now - self.settings.unnamed_sampler_seconds
        needed |= await self.ledger.read(retention.directories_sampled, silent_since=silent_since)
        await self._remove(key for key in orphans if key not in needed)
        await self._forget([key for key in dead if key not in needed])

    async def remove_deleted(self, directory: str) -> None:
        """Remove a checkpoint that its owner has deleted, unless a replay needs it. Samplers of it end."""
        if directory not in await self.ledger.read(retention.directories_to_load):
            await self._remove([directory])
            await self._forget([directory])

    async def _forget(self, directories: list[str]) -> None:
        for key in directories:
            self.engine.outbox.put_own(
                messages.encode(messages.ReleaseSampler(f"release-{uuid.uuid4().hex}", key))
            )
            self.on_removed(key)
        await self.ledger.write(retention.forget_checkpoints, directories=directories)

    async def _of_known_models(self, keys: list[str]) -> list[str]:
        known = await self.ledger.read(retention.known_models) if keys else set()
        return [key for key in keys if key.split("/")[1].replace("@", ":") in known]

    def _directories(self, pattern: str) -> list[str]:
        return [
            str(path.relative_to(self.settings.data_dir)) for path in self.settings.data_dir.glob(pattern)
        ]

    async def _remove(self, keys: Iterable[str]) -> None:
        for key in list(keys):
            log.info("removing %s", key)
            size = await asyncio.to_thread(_bytes_below, self.settings.data_dir / key)
            await asyncio.to_thread(shutil.rmtree, self.settings.data_dir / key, ignore_errors=True)
            kind = key.split("/")[0]
            self.used_bytes[kind] = max(0, self.used_bytes[kind] - size)

    def _measure(self) -> dict[str, int]:
        used = {kind: _bytes_below(self.settings.data_dir / kind) for kind in KINDS}
        return used | {"ledger": self.ledger_bytes()}

    def ledger_bytes(self) -> int:
        """Return the size of the ledger's files, if it is in files, and of the payloads beside it."""
        ledger = sqlite_file(self.settings.ledger_url)
        files = [] if ledger is None else ledger.parent.glob(f"{ledger.name}*")
        return sum(_size(path) for path in files) + self.payloads.used_bytes()


def _finished_name(key: str) -> str:
    """Return the final name of a directory that is being written."""
    return _UNFINISHED.sub("", key)


def _bytes_below(directory: Path) -> int:
    return sum(_size(path) for path in directory.rglob("*"))


def _size(path: Path) -> int:
    """Return a file's bytes; 0 if it is no file, or is gone."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0
