"""Snapshots of models, and how models come back: after an engine's death, a restart, or a silent time.

A model is created from its newest snapshot (or from the one before, if that is damaged). Then the operations
after the snapshot are sent again, in order; answers that the client already has are dropped.

What the engine was computing when it died is suspect: a model, or a sample. In the next engine the suspects
run one after the other, beside everything that is not suspect. So an operation that ends every engine is told
apart from those that only ran beside it, and is given up after a few deaths.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from ...ckpt import paths
from ...engine import messages
from ..errors import ApiError, Unavailable
from ..events import Event
from ..ledger import payloads as payload_rows
from ..ledger import tenancy
from ..ledger.ledger import Ledger
from ..operations.operation import Dispatcher, Operation
from ..operations.operations import Operations
from ..operations.payloads import Payloads
from ..settings import Settings
from ..supervision.engine_process import Lane
from ..supervision.supervisor import Supervisor
from .run import KnownRuns, Run

log = logging.getLogger("tinsmith.recovery")


@dataclass(eq=False)
class Recovery:
    """Brings models back, and sends the engine what the ledger has accepted and nobody has answered."""

    ledger: Ledger
    engine: Supervisor
    operations: Operations
    dispatcher: Dispatcher
    runs: KnownRuns
    settings: Settings

    def __post_init__(self) -> None:
        self._quarantine = Quarantine(self.settings.deaths_per_operation, self.settings.death_window_seconds)
        self._held: set[str] = set()  # models and samples that wait for their turn in quarantine
        self._trials: asyncio.Task | None = None
        self.replayed = 0  # operations that were sent to an engine again, since the start
        self.engine.died.subscribe(self.engine_died)
        self.engine.started.subscribe(self.take_up)
        self.engine.lost.subscribe(self.payload_lost)

    def engine_died(self, under_way: list[Suspect]) -> None:
        """Note that the engine's states are gone, and give up what has ended engines too often."""
        for run in list(self.runs.values()):
            run.resident = False
            if run.restoring is not None:
                run.restoring.cancel()
        if self._trials is not None:
            self._trials.cancel()
        waiting = {operation.request_id: operation for operation in self.operations.unanswered()}
        for request_id, model_id in self._quarantine.blame(under_way):
            blamed = self.runs.get(model_id)
            deaths = f"{self.settings.deaths_per_operation} engines ended while they ran it"
            log.error("%s of %s is given up: %s", request_id, model_id or "no model", deaths)
            if (operation := waiting.get(request_id)) is not None:
                self.operations.fail([operation], f"{deaths}; it is not tried again", "server", ran=True)
            elif blamed is not None:
                if request_id == snapshot_request(blamed):
                    blamed.may_be_saved = False
                else:
                    blamed.broken = f"{deaths}: {request_id}"

    def payload_lost(self, request_id: str, model_id: str, why: str) -> None:
        """Fail an operation whose payload is lost, and those after it, which would train something else."""
        run = self.runs.get(model_id)
        if run is None:
            lost = [each for each in self.operations.unanswered() if each.request_id == request_id]
            self.operations.fail(lost, f"the operation cannot be run: {why}", "server")
            return
        log.error("model %s is given up until the next start: %s", model_id, why)
        run.broken, run.resident = why, False
        self._fail_released(run, why)

    def take_up(self) -> None:
        """Send everything unanswered to the new engine, and the suspects one after the other."""
        subjects = self._quarantine.subjects()
        self._held = set(subjects)
        for operation in self.operations.unanswered():
            self._send_again(operation)
        self._trials = asyncio.ensure_future(self._try_each(subjects))

    def _send_again(self, operation: Operation) -> None:
        run = self.runs.get(operation.model_id)
        if run is not None and not self._waits_for_its_number(operation):
            self.bring_back(run)
        elif not operation.model_id and operation.request_id not in self._held:
            self.operations.send(operation)
            self.replayed += 1

    def _waits_for_its_number(self, operation: Operation) -> bool:
        return bool(operation.seq_id) and operation.seq_id >= self.dispatcher.next_seq(operation.model_id)

    async def _try_each(self, subjects: list[str]) -> None:
        for subject in subjects:
            self._held.discard(subject)
            due = [
                operation
                for operation in self.operations.unanswered()
                if subject in (operation.model_id, operation.request_id)
                and not self._waits_for_its_number(operation)
            ]
            for operation in due:
                self._send_again(operation)
            # Of a model's operations that are replayed, the first one after them tells that they ran.
            suspects = self._quarantine.requests(subject)
            for operation in [each for each in due if each.request_id in suspects] or due[:1]:
                await operation.finished.wait()
            self._quarantine.acquit(subject)

    # --- one model

    def bring_back(self, run: Run) -> None:
        """Begin to bring the model back, unless the engine has it."""
        if run.id in self._held or not self.engine.alive:
            return  # its turn will come, or the next engine
        if not run.resident and (run.restoring is None or run.restoring.done()):
            run.restoring = asyncio.ensure_future(self._restore(run))

    async def bring_back_now(self, run: Run) -> bool:
        """Bring the model back; return whether the engine has it, or has been sent all that it needs for it.

        Waits while the model is in quarantine.
        """
        while run.id in self._held:
            await asyncio.sleep(1.0)
        self.bring_back(run)
        if run.restoring is not None:
            await asyncio.wait([run.restoring])
        return run.resident

    async def _restore(self, run: Run) -> None:
        while run.broken is None:
            try:
                return await self._replay(run)
            except (SQLAlchemyError, ApiError) as error:
                log.error("model %s cannot be brought back yet: %s", run.id, error)
            with contextlib.suppress(Unavailable):  # what there is of it; perhaps nothing
                await self.engine.request(messages.DeleteModel(f"delete-{run.id}", run.id))
            await asyncio.sleep(1)
        self._fail_released(run, run.broken)

    async def _replay(self, run: Run) -> None:
        await self.operations.written()  # so that nothing is replayed which has failed for good
        creation = run.create_message
        created = await self.operations.find(run.owner, creation.request_id)
        if created is not None and created.answer is None:
            self.operations.send(created)
            await created.finished.wait()
            sent = 0
        else:
            try:
                answer, sent = await self._recreate(run, creation)
            except Unavailable:
                return  # the ledger has it all; the next engine does it
            if isinstance(answer, messages.Failed):
                log.error("model %s could not be brought back: %s", run.id, answer.message)
                self._fail_released(run, answer.message)
                return
        while (through := self.dispatcher.next_seq(run.id) - 1) > sent:
            replay = await self.ledger.read(
                payload_rows.to_replay, model_id=run.id, after=sent, through=through
            )
            for row in replay:
                self.engine.outbox.put(Lane(run.id), row.operation_id, row.size)
                self.replayed += 1
            sent = through
        run.resident, run.used_at = True, time.monotonic()

    async def _recreate(
        self, run: Run, creation: messages.CreateModel
    ) -> tuple[messages.Done | messages.Failed, int]:
        """Create the model from its newest snapshot or, if that cannot be read, from what came before it.

        Return the answer, and the number of the operation after which the state was. Raises
        Unavailable, SQLAlchemyError or ApiError.
        """
        request = msgspec.structs.replace(creation, request_id=f"restore-{run.id}")
        answer = await self.engine.request(_from_snapshot(request, run.snapshot))
        if isinstance(answer, messages.Done) or run.older_snapshot_seq is None:
            return answer, run.snapshot_seq
        log.error(
            "the newest snapshot of model %s cannot be read; operations after %d are replayed instead: %s",
            run.id,
            run.older_snapshot_seq,
            answer.message,
        )
        older = await self.engine.request(_from_snapshot(request, run.older_snapshot))
        if isinstance(older, messages.Failed):
            return answer, run.snapshot_seq
        snapshot, snapshot_seq = run.older_snapshot, run.older_snapshot_seq
        run.snapshot, run.snapshot_seq = snapshot, snapshot_seq
        run.older_snapshot = run.older_snapshot_seq = None
        await self.ledger.write(
            tenancy.update_model,
            run.id,
            snapshot=snapshot,
            snapshot_seq=snapshot_seq,
            older_snapshot=None,
            older_snapshot_seq=None,
        )
        return older, snapshot_seq

    def _fail_released(self, run: Run, why: str) -> None:
        through = self.dispatcher.next_seq(run.id) - 1
        self.operations.fail(
            [each for each in self.operations.unanswered(run.id) if each.seq_id <= through],
            f"the model could not be brought back: {why}",
            "server",
        )


def _from_snapshot(creation: messages.CreateModel, snapshot: str | None) -> messages.CreateModel:
    """Make the creation begin from a snapshot; without one it stays as it was."""
    if snapshot is None:
        return creation
    return msgspec.structs.replace(creation, checkpoint=snapshot, optimizer_state=True)


def snapshot_request(run: Run) -> str:
    """Return the id of the request to save the run's state. There is one such request at a time."""
    return f"snapshot-{run.id}"


@dataclass(eq=False)
class Snapshots:
    """Saves the states of models, so that few operations are kept and replayed."""

    ledger: Ledger
    engine: Supervisor
    dispatcher: Dispatcher
    payloads: Payloads
    settings: Settings
    written: Event[[int]] = field(default_factory=Event, init=False)  # with a snapshot's size in bytes
    being_written: set[str] = field(default_factory=set, init=False)  # not named by the ledger yet

    def _released(self, run: Run) -> int:
        """Return the number of the last operation that the engine was sent."""
        return self.dispatcher.next_seq(run.id) - 1

    def take_if_due(self, run: Run, released: int) -> None:
        """Begin a snapshot if enough operations, or bytes of them, up to `released` came after the last."""
        settings = self.settings
        due = (
            released - run.snapshot_seq >= settings.snapshot_operations
            or run.bytes_since_snapshot >= settings.snapshot_bytes
        )
        if due and run.may_be_saved and (run.saving is None or run.saving.done()):
            run.saving = asyncio.ensure_future(self._take_until_not_due(run))

    async def _take_until_not_due(self, run: Run) -> None:
        """Take a snapshot, and another one if operations that came meanwhile have made it due."""
        if await self._take(run):
            asyncio.get_running_loop().call_soon(lambda: self.take_if_due(run, self._released(run)))

    async def take_all(self, runs: Iterable[Run]) -> None:
        await asyncio.gather(*(self.take_if_changed(run) for run in runs))

    async def take_if_changed(self, run: Run) -> bool:
        """Take a snapshot if there is none of the model's present state; return whether there is one now.

        A model that is as it was created needs none.
        """
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
        """Save the state after the last released operation; return whether that worked.

        What came before it need not be replayed.
        """
        async with run.lock:
            through = self._released(run)
            directory = f"snapshots/{run.id.replace(':', '@')}/{through}-{uuid.uuid4().hex[:16]}"
            run.bytes_since_snapshot = 0
            self.payloads.seal(run.id)
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
        """Note a snapshot in the ledger, and return the directory of the one that is not needed any more.

        The snapshot before it is kept, in case this one cannot be read; operations from before that
        are forgotten.
        """
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
            await self.ledger.write(change)
        except ApiError as error:
            log.error("the snapshot of model %s could not be noted: %s", run.id, error)
            return directory
        run.snapshot, run.snapshot_seq = directory, through
        run.older_snapshot, run.older_snapshot_seq = older, older_seq
        try:
            await self.payloads.forget_through(run.id, older_seq)
        except (ApiError, SQLAlchemyError, OSError) as error:  # the next snapshot forgets these too
            log.error("payloads of model %s could not be forgotten: %s", run.id, error)
        return oldest

    async def _save(self, run: Run, directory: str) -> bool:
        try:
            answer = await self.engine.request(messages.SaveState(snapshot_request(run), run.id, directory))
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
        """Remove the snapshots of a model that nobody will bring back."""
        for directory in (run.snapshot, run.older_snapshot):
            if directory is not None:
                await self._remove_directory(directory)
        run.snapshot = run.older_snapshot = None

    async def _remove_directory(self, directory: str) -> None:
        path = paths.resolve(self.settings.data_dir, directory)
        await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)


Suspect = tuple[str, str]  # a request id, and its model's or ''


class Quarantine:
    """Counts the deaths of engines by what they were computing.

    An operation in whose turn `deaths` engines ended within `window_seconds` is to be given up.
    """

    def __init__(self, deaths: int, window_seconds: float, clock: Callable[[], float] = time.monotonic):
        self._deaths = deaths
        self._window = window_seconds
        self._clock = clock
        self._died_at: dict[Suspect, list[float]] = {}

    def blame(self, under_way: list[Suspect]) -> list[Suspect]:
        """Count a death for what the engine was computing; return what is to be given up, and forget it."""
        now = self._clock()
        for suspect in under_way:
            self._died_at.setdefault(suspect, []).append(now)
        for suspect, times in list(self._died_at.items()):
            self._died_at[suspect] = [at for at in times if now - at < self._window]
            if not self._died_at[suspect]:
                del self._died_at[suspect]
        guilty = [suspect for suspect in under_way if len(self._died_at.get(suspect, ())) >= self._deaths]
        for suspect in guilty:
            del self._died_at[suspect]
        return guilty

    def subjects(self) -> list[str]:
        """Return the models and samples that are to run one by one, those with the fewest deaths first."""
        deaths: dict[str, int] = {}
        for (request_id, model_id), times in self._died_at.items():
            subject = model_id or request_id
            deaths[subject] = max(deaths.get(subject, 0), len(times))
        return sorted(deaths, key=lambda subject: deaths[subject])

    def requests(self, subject: str) -> set[str]:
        """Return the ids of the requests that a model or a sample is suspect for."""
        return {request_id for request_id, model_id in self._died_at if (model_id or request_id) == subject}

    def acquit(self, subject: str) -> None:
        """Forget the deaths of a model or a sample that has run without another one."""
        for suspect in [each for each in self._died_at if (each[1] or each[0]) == subject]:
            del self._died_at[suspect]
