"""Models come back: after the engine died, after the server's start, after a silent time.

A model is created from its newest snapshot (or from the one before it, should that be damaged), then the
operations after the snapshot are sent again, in order, and their answers dropped where the client already had
them. What engines died of is tried alone
(quarantine.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from functools import partial

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from ...engine import messages
from ..errors import ApiError, Unavailable
from ..ledger import payloads as payload_rows
from ..ledger import tenancy
from ..ledger.ledger import Ledger
from ..operations.dispatcher import Dispatcher
from ..operations.operation import Operation
from ..operations.operations import Operations
from ..settings import Settings
from ..supervision.outbox import Lane
from ..supervision.quarantine import Quarantine, Suspect
from ..supervision.supervisor import Supervisor
from .run import KnownRuns, Run
from .snapshots import snapshot_request

log = logging.getLogger("tinsmith.recovery")


class Recovery:
    """Brings models back, and sends the engine what the ledger has accepted and nobody has answered."""

    def __init__(
        self,
        ledger: Ledger,
        engine: Supervisor,
        operations: Operations,
        dispatcher: Dispatcher[Operation],
        runs: KnownRuns,
        settings: Settings,
    ):
        self._ledger = ledger
        self._engine = engine
        self._operations = operations
        self._dispatcher = dispatcher
        self._runs = runs
        self._settings = settings
        self._quarantine = Quarantine(settings.deaths_per_operation, settings.death_window_seconds)
        self._held: set[str] = set()  # models and samples that wait for their turn in quarantine
        self._trials: asyncio.Task | None = None
        self.replayed = 0  # operations that were sent to an engine again, since the start
        engine.died.subscribe(self.engine_died)
        engine.started.subscribe(self.take_up)
        engine.lost.subscribe(self.payload_lost)

    def engine_died(self, under_way: list[Suspect]) -> None:
        """The states that it held are gone; what it died of more than a few times is given up."""
        for run in self._runs.all():
            run.resident = False
            if run.restoring is not None:
                run.restoring.cancel()
        if self._trials is not None:
            self._trials.cancel()
        waiting = {operation.request_id: operation for operation in self._operations.unanswered()}
        for request_id, model_id in self._quarantine.blame(under_way):
            blamed = self._runs.get(model_id)
            deaths = f"{self._settings.deaths_per_operation} engines ended while they ran it"
            log.error("%s of %s is given up: %s", request_id, model_id or "no model", deaths)
            if (operation := waiting.get(request_id)) is not None:
                self._operations.fail([operation], f"{deaths}; it is not tried again", "server", ran=True)
            elif blamed is not None:
                if request_id == snapshot_request(blamed):
                    blamed.may_be_saved = False
                else:
                    blamed.broken = f"{deaths}: {request_id}"

    def payload_lost(self, request_id: str, model_id: str, why: str) -> None:
        """An operation cannot be run; without it, what comes after it would not be what was asked for."""
        run = self._runs.get(model_id)
        if run is None:
            lost = [each for each in self._operations.unanswered() if each.request_id == request_id]
            self._operations.fail(lost, f"the operation cannot be run: {why}", "server")
            return
        log.error("model %s is given up until the next start: %s", model_id, why)
        run.broken, run.resident = why, False
        self._fail_released(run, why)

    def take_up(self) -> None:
        """Everything unanswered goes to the new engine; what engines died of one after the other."""
        subjects = self._quarantine.subjects()
        self._held = set(subjects)
        for operation in self._operations.unanswered():
            self._send_again(operation)
        self._trials = asyncio.ensure_future(self._try_each(subjects))

    def _send_again(self, operation: Operation) -> None:
        run = self._runs.get(operation.model_id)
        if run is not None and not self._waits_for_its_number(operation):
            self.bring_back(run)
        elif not operation.model_id and operation.request_id not in self._held:
            self._operations.send(operation)
            self.replayed += 1

    def _waits_for_its_number(self, operation: Operation) -> bool:
        return operation.sequenced and operation.seq_id >= self._dispatcher.next_seq(operation.model_id)

    async def _try_each(self, subjects: list[str]) -> None:
        for subject in subjects:
            self._held.discard(subject)
            due = [
                operation
                for operation in self._operations.unanswered()
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
        """Begins to, unless the engine has it; nobody waits for it."""
        if run.id in self._held or not self._engine.alive:
            return  # its turn will come, or the next engine
        if not run.resident and (run.restoring is None or run.restoring.done()):
            run.restoring = asyncio.ensure_future(self._restore(run))

    async def bring_back_now(self, run: Run) -> bool:
        """Whether the engine has the model, and what its operations make, or is sent it now.

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
                await self._engine.request(messages.DeleteModel(f"delete-{run.id}", run.id))
            await asyncio.sleep(1)
        self._fail_released(run, run.broken)

    async def _replay(self, run: Run) -> None:
        await self._operations.written()  # so that nothing is replayed which has failed for good
        creation = run.create_message
        created = await self._operations.find(run.owner, creation.request_id)
        if created is not None and created.answer is None:
            self._operations.send(created)
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
        while (through := self._dispatcher.next_seq(run.id) - 1) > sent:
            replay = await self._ledger.read(
                partial(payload_rows.to_replay, model_id=run.id, after=sent, through=through)
            )
            for row in replay:
                self._engine.send_stored(Lane(run.id), row.operation_id, row.size)
                self.replayed += 1
            sent = through
        run.resident, run.used_at = True, time.monotonic()

    async def _recreate(
        self, run: Run, creation: messages.CreateModel
    ) -> tuple[messages.Done | messages.Failed, int]:
        """From the newest snapshot or, where that cannot be read, from what comes before it; and the
        operation that this is the state after. Raises Unavailable, and SQLAlchemyError or ApiError."""
        request = msgspec.structs.replace(creation, request_id=f"restore-{run.id}")
        answer = await self._engine.request(_from_snapshot(request, run.snapshot))
        if isinstance(answer, messages.Done) or run.older_snapshot_seq is None:
            return answer, run.snapshot_seq
        log.error(
            "the newest snapshot of model %s cannot be read; operations after %d are replayed instead: %s",
            run.id,
            run.older_snapshot_seq,
            answer.message,
        )
        older = await self._engine.request(_from_snapshot(request, run.older_snapshot))
        if isinstance(older, messages.Failed):
            return answer, run.snapshot_seq
        snapshot, snapshot_seq = run.older_snapshot, run.older_snapshot_seq
        run.snapshot, run.snapshot_seq = snapshot, snapshot_seq
        run.older_snapshot = run.older_snapshot_seq = None
        await self._ledger.write(
            lambda connection: tenancy.update_model(
                connection,
                run.id,
                snapshot=snapshot,
                snapshot_seq=snapshot_seq,
                older_snapshot=None,
                older_snapshot_seq=None,
            )
        )
        return older, snapshot_seq

    def _fail_released(self, run: Run, why: str) -> None:
        through = self._dispatcher.next_seq(run.id) - 1
        self._operations.fail(
            [each for each in self._operations.unanswered(run.id) if each.seq_id <= through],
            f"the model could not be brought back: {why}",
            "server",
        )


def _from_snapshot(creation: messages.CreateModel, snapshot: str | None) -> messages.CreateModel:
    """None: from its creation."""
    if snapshot is None:
        return creation
    return msgspec.structs.replace(creation, checkpoint=snapshot, optimizer_state=True)
