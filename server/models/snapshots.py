"""Snapshots of training states, so that few operations need to be kept and replayed."""

from __future__ import annotations

import asyncio
import logging
import shutil
import uuid
from collections.abc import Iterable

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from ...ckpt import paths
from ...engine import messages
from ..errors import ApiError, Unavailable
from ..events import Event
from ..ledger import tenancy
from ..ledger.ledger import Ledger
from ..operations.dispatcher import Dispatcher
from ..operations.operation import Operation
from ..operations.payloads import Payloads
from ..settings import Settings
from ..supervision.supervisor import Supervisor
from .run import Run

log = logging.getLogger("tinsmith.snapshots")


def snapshot_request(run: Run) -> str:
    """The id of the request to save the run's state: there is one at a time."""
    return f"snapshot-{run.id}"


class Snapshots:
    def __init__(
        self,
        ledger: Ledger,
        engine: Supervisor,
        dispatcher: Dispatcher[Operation],
        payloads: Payloads,
        settings: Settings,
    ):
        self._ledger = ledger
        self._engine = engine
        self._dispatcher = dispatcher
        self._payloads = payloads
        self._settings = settings
        self.written: Event[[int]] = Event()  # with a snapshot's size in bytes
        self.being_written: set[str] = set()  # directories that the ledger does not name yet

    def _released(self, run: Run) -> int:
        """The number of the last operation that the engine was sent."""
        return self._dispatcher.next_seq(run.id) - 1

    def take_if_due(self, run: Run) -> None:
        """After some operations, or some bytes of them, since the last one; nobody waits for it."""
        settings = self._settings
        due = (
            self._released(run) - run.snapshot_seq >= settings.snapshot_operations
            or run.bytes_since_snapshot >= settings.snapshot_bytes
        )
        if due and run.may_be_saved and (run.saving is None or run.saving.done()):
            run.saving = asyncio.ensure_future(self._take_until_not_due(run))

    async def _take_until_not_due(self, run: Run) -> None:
        """Operations go on while a snapshot is written; the last of them may have made the next one due."""
        if await self._take(run):
            asyncio.get_running_loop().call_soon(self.take_if_due, run)

    async def take_all(self, runs: Iterable[Run]) -> None:
        await asyncio.gather(*(self.take_if_changed(run) for run in runs))

    async def take_if_changed(self, run: Run) -> bool:
        """Whether the newest snapshot, or the model's creation alone, is its state as the engine has it."""
        if run.resident and run.may_be_saved and self._has_changed(run):
            await self._take(run)
        return run.resident and not self._has_changed(run)

    def _has_changed(self, run: Run) -> bool:
        if run.state != "ready":
            return False
        if self._released(run) > run.snapshot_seq:
            return True
        # A fresh model is made again from its seed; a loaded one must not depend on somebody's checkpoint.
        return run.snapshot is None and bool(run.create_message.checkpoint)

    async def _take(self, run: Run) -> bool:
        """Saves the state after the last released operation; what came before it need not be replayed.
        Whether that worked."""
        async with run.lock:
            through = self._released(run)
            directory = f"snapshots/{run.id.replace(':', '@')}/{through}-{uuid.uuid4().hex[:16]}"
            run.bytes_since_snapshot = 0
            self._payloads.seal(run.id)
            self.being_written.add(directory)
            try:
                if not await self._save(run, directory):
                    await self._remove_directory(directory)
                    return False
                oldest = await self._note(run, directory, through)
            finally:
                self.being_written.discard(directory)
        if oldest is not None:
            await self._remove_directory(oldest)
        return run.snapshot == directory

    async def _note(self, run: Run, directory: str, through: int) -> str | None:
        """In the ledger, which can then forget what came before the snapshot before this one, in case that
        this one cannot be read; gives the snapshot that is not needed any more."""
        oldest, older, older_seq = run.older_snapshot, run.snapshot, run.snapshot_seq

        def change(connection: Connection) -> None:
            tenancy.update_model(
                connection,
                run.id,
                snapshot=directory,
                snapshot_seq=through,
                older_snapshot=older,
                older_snapshot_seq=older_seq,
            )

        try:
            await self._ledger.write(change)
        except ApiError as error:
            log.error("the snapshot of model %s could not be noted: %s", run.id, error)
            return directory
        run.snapshot, run.snapshot_seq = directory, through
        run.older_snapshot, run.older_snapshot_seq = older, older_seq
        try:
            await self._payloads.forget_through(run.id, older_seq)
        except (ApiError, SQLAlchemyError, OSError) as error:  # the next snapshot forgets these too
            log.error("payloads of model %s could not be forgotten: %s", run.id, error)
        return oldest

    async def _save(self, run: Run, directory: str) -> bool:
        try:
            answer = await self._engine.request(messages.SaveState(snapshot_request(run), run.id, directory))
        except Unavailable as error:
            log.warning("the state of model %s was not saved: %s", run.id, error)
            return False
        if isinstance(answer, messages.Failed):
            log.error("the state of model %s could not be saved: %s", run.id, answer.message)
            return False
        if isinstance(answer.output, messages.StateSaved):
            self.written(answer.output.size_bytes)
        return True

    async def remove(self, run: Run) -> None:
        """Nobody will bring this model back."""
        for directory in (run.snapshot, run.older_snapshot):
            if directory is not None:
                await self._remove_directory(directory)
        run.snapshot = run.older_snapshot = None

    async def _remove_directory(self, directory: str) -> None:
        path = paths.resolve(self._settings.data_dir, directory)
        await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
