"""Training runs: the models that clients create, and whether the engine has them.

A run's state is a fold over its operations. The engine holds the states of some runs; one that it does not
hold (after a restart of the engine or of the server, or when its client was silent for long) is brought back
when its next operation is due: created from its newest snapshot, then the operations after the snapshot are
sent again, in order, and their answers dropped where the client already had them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import Connection, Row

from ..engine import messages
from .dispatcher import Dispatcher
from .errors import BadRequest, NotFound, Unavailable
from .ledger import operations as operation_rows
from .ledger import tenancy
from .ledger.ledger import Ledger
from .operation import Operation, Submission
from .operations import Operations
from .quarantine import Quarantine, Suspect
from .run import Run, from_row
from .settings import Settings
from .snapshots import Snapshots, snapshot_request
from .supervisor import Supervisor

log = logging.getLogger("tinsmith.runs")


def model_id(session_id: str, model_seq_id: int) -> str:
    """Clients compute this id too."""
    return f"{session_id}:train:{model_seq_id}"


class Runs:
    def __init__(self, ledger: Ledger, engine: Supervisor, operations: Operations, settings: Settings):
        self._ledger = ledger
        self._engine = engine
        self._operations = operations
        self._settings = settings
        self._runs: dict[str, Run] = {}
        self._quarantine = Quarantine(settings.deaths_per_operation, settings.death_window_seconds)
        self._held: set[str] = set()  # models and samples that wait for their turn in quarantine
        self._trials: asyncio.Task | None = None
        self._dispatcher: Dispatcher[Operation] = Dispatcher(
            self._release, self._give_up, settings.gap_grace_seconds
        )
        self.snapshots = Snapshots(ledger, engine, self._dispatcher, settings)
        operations.dispatcher = self._dispatcher
        operations.may_consume = self.find
        operations.on_created = self._created
        engine.on_death = self._engine_died
        engine.on_start = self._take_up

    # --- finding and creating

    async def find(self, owner: str, run_id: str) -> Run:
        """Raises NotFound for what does not exist or is not the owner's."""
        run = self._runs.get(run_id)
        if run is None:
            row = await self._ledger.read(lambda connection: tenancy.find_model(connection, run_id))
            if row is not None and row.owner == owner:
                await self._open(row)
                run = self._runs[run_id]
        if run is None or run.owner != owner:
            raise NotFound(f"unknown model {run_id!r}: create it with create_model first")
        return run

    async def find_trainable(self, owner: str, run_id: str) -> Run:
        """As `find`; raises BadRequest for a model whose creation failed or whose session has ended."""
        run = await self.find(owner, run_id)
        if run.state == "finished":
            raise BadRequest(f"model {run_id!r} belongs to a session that has finished; create a new one")
        if run.state == "failed":
            raise BadRequest(f"model {run_id!r} could not be created; its create_model request says why")
        return run

    def unused_seq(self, run: Run) -> int:
        return self._dispatcher.unused_seq(run.id)

    async def create(
        self,
        owner: str,
        session_id: str,
        model_seq_id: int,
        message: messages.CreateModel,
        optimizer: dict[str, Any],
        user_metadata: dict[str, Any],
        reply: dict[str, Any],
    ) -> Operation:
        """Registers the model and asks the engine for it. `message` has no request id yet."""
        lora = None if message.lora is None else msgspec.structs.asdict(message.lora)
        run: Run | None = None

        def also(connection: Connection, request_id: str) -> None:
            nonlocal run
            creation = messages.encode(msgspec.structs.replace(message, request_id=request_id))
            tenancy.add_model(
                connection,
                id=message.model_id,
                owner=owner,
                session_id=session_id,
                base_model=message.base_model,
                lora=lora,
                optimizer=optimizer,
                user_metadata=user_metadata,
                state="creating",
                creation=creation,
            )
            run = Run(
                message.model_id,
                owner,
                session_id,
                message.base_model,
                lora,
                optimizer,
                user_metadata,
                "creating",
                creation,
                None,
                0,
            )

        operation = await self._operations.accept(
            Submission(
                owner,
                "create_model",
                f"create/{session_id}/{model_seq_id}",
                lambda request_id: msgspec.structs.replace(message, request_id=request_id),
                reply,
                message.model_id,
                also=also,
            )
        )
        if run is not None:
            run = self._runs.setdefault(run.id, run)
            self._dispatcher.open(run.id, 1)
            run.resident = operation.sent_in == self._engine.life
            if operation.answer is not None:
                self._created(operation)
            elif not run.resident:
                self._bring_back(run)
        return operation

    def _created(self, operation: Operation) -> None:
        run = self._runs.get(operation.model_id)
        if run is not None and run.state == "creating":
            run.state = "ready" if isinstance(operation.answer, messages.Done) else "failed"

    async def _open(self, row: Row) -> None:
        """Takes up a run of the ledger where its operations stand."""
        early = await self._ledger.read(
            lambda connection: operation_rows.early_arrivals(connection, row.id, row.executed_seq)
        )
        if row.id not in self._runs:
            self._runs[row.id] = from_row(row)
            self._dispatcher.open(row.id, row.executed_seq + 1)
            for arrival in early:
                self._dispatcher.add(self._operations.load(arrival))

    # --- engines that come and go

    async def resume(self) -> None:
        """At start: what was accepted and not answered is taken up again."""
        unfinished = await self._ledger.read(operation_rows.unfinished)
        for row in unfinished:
            operation = self._operations.load(row)
            if operation.model_id:
                run = await self.find(operation.owner, operation.model_id)
                if run.state == "finished" and run.leaving is None:
                    run.leaving = asyncio.ensure_future(self._finish(run))
        self._take_up()
        if unfinished:
            log.info("%d unfinished operations taken up again", len(unfinished))

    def _engine_died(self, under_way: list[Suspect]) -> None:
        """The states that it held are gone; what it died of more than a few times is given up."""
        for run in self._runs.values():
            run.resident = False
            if run.restoring is not None:
                run.restoring.cancel()
        if self._trials is not None:
            self._trials.cancel()
        waiting = {operation.request_id: operation for operation in self._operations.unanswered()}
        for request_id, model_id in self._quarantine.blame(under_way):
            deaths = f"{self._settings.deaths_per_operation} engines ended while they ran it"
            log.error("%s of %s is given up: %s", request_id, model_id or "no model", deaths)
            if (operation := waiting.get(request_id)) is not None:
                self._operations.fail([operation], f"{deaths}; it is not tried again", "server", ran=True)
            elif model_id in self._runs:
                run = self._runs[model_id]
                if request_id == snapshot_request(run):
                    run.may_be_saved = False
                else:
                    run.broken = f"{deaths}: {request_id}"

    def _take_up(self) -> None:
        """Everything unanswered goes to the new engine; what engines died of one after the other."""
        subjects = self._quarantine.subjects()
        self._held = set(subjects)
        for operation in self._operations.unanswered():
            self._send_again(operation)
        self._trials = asyncio.ensure_future(self._try_each(subjects))

    def _send_again(self, operation: Operation) -> None:
        run = self._runs.get(operation.model_id)
        if run is not None and not self._waits_for_its_number(operation):
            self._bring_back(run)
        elif not operation.model_id and operation.request_id not in self._held:
            self._operations.send(operation)

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

    # --- releasing

    def _release(self, operation: Operation) -> None:
        run = self._runs[operation.model_id]
        run.used_at = time.monotonic()
        payload = operation.payload
        if not run.resident or payload is None:
            self._bring_back(run)
            return
        self._engine.send(payload)
        run.bytes_since_snapshot += len(payload)
        self.snapshots.take_if_due(run)

    def _give_up(self, operations: list[Operation], missing: int) -> None:
        self._operations.fail(
            operations,
            f"seq_id {missing} of this model never arrived within {self._settings.gap_grace_seconds:.0f} s; "
            "the operations sent after it were not run",
        )

    def _bring_back(self, run: Run) -> None:
        if run.id in self._held or not self._engine.alive:
            return  # its turn will come, or the next engine
        if not run.resident and (run.restoring is None or run.restoring.done()):
            run.restoring = asyncio.ensure_future(self._restore(run))

    async def bring_back(self, owner: str, run_id: str) -> bool:
        """Whether the engine has the model, and what its operations make, or is sent it now.

        Waits while the model is in quarantine. Raises NotFound."""
        run = await self.find(owner, run_id)
        while run.id in self._held:
            await asyncio.sleep(1.0)
        self._bring_back(run)
        if run.restoring is not None:
            await asyncio.wait([run.restoring])
        return run.resident

    async def _restore(self, run: Run) -> None:
        if run.broken is not None:
            await self._fail_released(run, run.broken)
            return
        await self._operations.written()  # so that nothing is replayed which has failed for good
        sent = 0
        creation = run.create_message
        created = await self._operations.find(run.owner, creation.request_id)
        if created is not None and created.answer is None:
            self._operations.send(created)
        else:
            changes: dict[str, Any] = {"request_id": f"restore-{run.id}"}
            if run.snapshot is not None:
                changes |= {"checkpoint": run.snapshot, "optimizer_state": True}
                sent = run.snapshot_seq
            try:
                answer = await self._engine.request(msgspec.structs.replace(creation, **changes))
            except Unavailable:
                return  # the ledger has it all; the next engine does it
            if isinstance(answer, messages.Failed):
                log.error("model %s could not be brought back: %s", run.id, answer.message)
                await self._fail_released(run, answer.message)
                return
        while (through := self._dispatcher.next_seq(run.id) - 1) > sent:
            replay = await self._ledger.read(
                partial(operation_rows.to_replay, model_id=run.id, after=sent, through=through)
            )
            for row in replay:
                self._engine.send(row.payload)
            sent = through
        run.resident, run.used_at = True, time.monotonic()

    async def _fail_released(self, run: Run, why: str) -> None:
        through = self._dispatcher.next_seq(run.id) - 1
        self._operations.fail(
            [each for each in self._unanswered(run) if each.seq_id <= through],
            f"the model could not be brought back: {why}",
            "server",
        )

    # --- leaving

    async def save_all(self) -> None:
        """Before a stop: the state of every model that changed since its last snapshot."""
        await self.snapshots.take_all(list(self._runs.values()))

    def resident(self) -> list[Run]:
        """Those that the engine has."""
        return [run for run in self._runs.values() if run.resident]

    async def rest(self, run: Run) -> None:
        """Its client is silent: the state is saved, and the engine forgets the model until it is needed."""
        if self._unanswered(run) or run.state != "ready":
            return
        if await self.snapshots.take_if_changed(run):
            log.info("model %s rests: its client is silent", run.id)
            await self._leave(run)

    async def finish(self, run: Run) -> None:
        """The session is over: the engine forgets the model once its operations are done."""
        if run.state == "finished":
            return
        run.state = "finished"
        await self._ledger.write(
            lambda connection: tenancy.update_model(connection, run.id, state="finished")
        )
        # Not awaited: the client need not wait for what it has queued.
        run.leaving = asyncio.ensure_future(self._finish(run))

    async def _finish(self, run: Run) -> None:
        for operation in self._unanswered(run):
            await operation.finished.wait()
        if self._unanswered(run):
            return  # the server stops, and its next start goes on here
        await self._leave(run)
        await self.snapshots.remove(run)

    def _unanswered(self, run: Run) -> list[Operation]:
        return [each for each in self._operations.unanswered() if each.model_id == run.id]

    async def _leave(self, run: Run) -> None:
        if not run.resident:
            return
        run.resident = False
        with contextlib.suppress(Unavailable):  # the engine is gone, and the model with it
            await self._engine.request(messages.DeleteModel(f"delete-{run.id}", run.id))


def new_seed() -> int:
    """Chosen here, so that a model without a seed is the same one in a replay."""
    return secrets.randbelow(1 << 31)
