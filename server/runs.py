"""Training runs: the models that clients create, and whether the engine has them.

A run's state is a fold over its operations. The engine holds the states of some runs; one that it does not
hold (after a restart) is brought back when its next operation is due: created from its newest snapshot,
then the operations after the snapshot are sent again, in order, and their answers dropped where the client
already had them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import uuid
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import Connection, Row

from ..ckpt import paths
from ..engine import messages
from .dispatcher import Dispatcher
from .engine_process import EngineProcess
from .errors import ApiError, BadRequest, NotFound, Unavailable
from .ledger import operations as operation_rows
from .ledger import tenancy
from .ledger.ledger import Ledger
from .operations import Operation, Operations, Submission
from .settings import Settings

log = logging.getLogger("tinsmith.runs")


@dataclass(eq=False)
class Run:
    """One model. `resident`: the engine has its state, up to the last operation released."""

    id: str
    owner: str
    session_id: str
    base_model: str
    lora: dict[str, Any] | None
    optimizer: dict[str, Any]
    user_metadata: dict[str, Any]
    state: str
    creation: bytes
    snapshot: str | None
    snapshot_seq: int
    resident: bool = False
    restoring: asyncio.Task | None = None
    saving: asyncio.Task | None = None
    bytes_since_snapshot: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


def _run(row: Row) -> Run:
    return Run(
        row.id,
        row.owner,
        row.session_id,
        row.base_model,
        row.lora,
        row.optimizer,
        row.user_metadata,
        row.state,
        row.creation,
        row.snapshot,
        row.snapshot_seq,
    )


def model_id(session_id: str, model_seq_id: int) -> str:
    """Clients compute this id too."""
    return f"{session_id}:train:{model_seq_id}"


class Runs:
    def __init__(self, ledger: Ledger, engine: EngineProcess, operations: Operations, settings: Settings):
        self._ledger = ledger
        self._engine = engine
        self._operations = operations
        self._settings = settings
        self._runs: dict[str, Run] = {}
        self._dispatcher: Dispatcher[Operation] = Dispatcher(
            self._release, self._give_up, settings.gap_grace_seconds
        )
        operations.dispatcher = self._dispatcher
        operations.may_consume = self.find

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
                resident=True,
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
        if run is not None and run.id not in self._runs:
            self._runs[run.id] = run
            self._dispatcher.open(run.id, 1)
            self._watch_creation(run, operation)
        return operation

    def _watch_creation(self, run: Run, operation: Operation) -> None:
        async def watch() -> None:
            await operation.finished.wait()
            if run.state == "creating" and operation.answer is not None:
                run.state = "ready" if isinstance(operation.answer, messages.Done) else "failed"

        run.restoring = asyncio.ensure_future(watch())

    async def _open(self, row: Row) -> None:
        """Takes up a run of the ledger where its operations stand."""
        early = await self._ledger.read(
            lambda connection: operation_rows.early_arrivals(connection, row.id, row.executed_seq)
        )
        if row.id not in self._runs:
            self._runs[row.id] = _run(row)
            self._dispatcher.open(row.id, row.executed_seq + 1)
            for arrival in early:
                self._dispatcher.add(self._operations.load(arrival))

    async def resume(self) -> None:
        """At start: everything that was accepted and not answered goes to the engine again."""
        unfinished = await self._ledger.read(operation_rows.unfinished)
        for row in unfinished:
            operation = self._operations.load(row)
            if operation.sequenced:
                run = await self.find(operation.owner, operation.model_id)
                if operation.seq_id < self._dispatcher.next_seq(run.id):
                    self._bring_back(run)
            elif operation.kind == "create_model":
                run = await self.find(operation.owner, operation.model_id)
                run.resident = True
                self._engine.send(row.payload)
                self._watch_creation(run, operation)
            else:
                self._engine.send(row.payload)
        if unfinished:
            log.info("%d unfinished operations taken up again", len(unfinished))

    # --- releasing

    def _release(self, operation: Operation) -> None:
        run = self._runs[operation.model_id]
        payload = operation.payload
        if not run.resident or payload is None:
            self._bring_back(run)
            return
        self._engine.send(payload)
        run.bytes_since_snapshot += len(payload)
        if self._is_due(run):
            self._snapshot_soon(run)

    def _give_up(self, operations: list[Operation], missing: int) -> None:
        self._operations.fail(
            operations,
            f"seq_id {missing} of this model never arrived within {self._settings.gap_grace_seconds:.0f} s; "
            "the operations sent after it were not run",
        )

    def _bring_back(self, run: Run) -> None:
        if run.restoring is None or run.restoring.done():
            run.restoring = asyncio.ensure_future(self._restore(run))

    async def _restore(self, run: Run) -> None:
        creation = messages.decode_to_engine(run.creation)
        assert isinstance(creation, messages.CreateModel)
        changes: dict[str, Any] = {"request_id": f"restore-{uuid.uuid4().hex}"}
        if run.snapshot is not None:
            changes |= {"checkpoint": run.snapshot, "optimizer_state": True}
        try:
            answer = await self._engine.request(msgspec.structs.replace(creation, **changes))
        except Unavailable:
            return  # the ledger has it all; the next engine does it
        if isinstance(answer, messages.Failed):
            log.error("model %s could not be brought back: %s", run.id, answer.message)
            await self._fail_released(run, answer)
            return
        sent = run.snapshot_seq
        while (through := self._dispatcher.next_seq(run.id) - 1) > sent:
            replay = await self._ledger.read(
                partial(operation_rows.to_replay, model_id=run.id, after=sent, through=through)
            )
            for row in replay:
                self._engine.send(row.payload)
            sent = through
        run.resident = True
        if run.state == "creating":
            run.state = "ready"

    async def _fail_released(self, run: Run, answer: messages.Failed) -> None:
        through = self._dispatcher.next_seq(run.id) - 1
        replay = await self._ledger.read(
            lambda connection: operation_rows.to_replay(connection, run.id, 0, through)
        )
        waiting = [self._operations.load(row) for row in replay if row.state == "accepted"]
        self._operations.fail(waiting, f"the model could not be brought back: {answer.message}", "server")

    # --- snapshots

    def _is_due(self, run: Run) -> bool:
        operations = self._dispatcher.next_seq(run.id) - 1 - run.snapshot_seq
        settings = self._settings
        return (
            operations >= settings.snapshot_operations or run.bytes_since_snapshot >= settings.snapshot_bytes
        )

    def _snapshot_soon(self, run: Run) -> None:
        if run.saving is None or run.saving.done():
            run.saving = asyncio.ensure_future(self._snapshot(run))

    async def _snapshot(self, run: Run) -> None:
        """Saves the state after the last released operation; what came before it need not be replayed."""
        async with run.lock:
            through = self._dispatcher.next_seq(run.id) - 1
            directory = f"snapshots/{run.id.replace(':', '@')}/{through}-{uuid.uuid4().hex[:16]}"
            request = messages.SaveState(f"snapshot-{uuid.uuid4().hex}", run.id, directory)
            run.bytes_since_snapshot = 0
            try:
                answer = await self._engine.request(request)
                if isinstance(answer, messages.Failed):
                    log.error("the state of model %s could not be saved: %s", run.id, answer.message)
                    return

                def change(connection: Connection) -> None:
                    tenancy.update_model(connection, run.id, snapshot=directory, snapshot_seq=through)
                    operation_rows.forget_payloads(connection, run.id, through)

                await self._ledger.write(change)
            except ApiError as error:
                log.error("the state of model %s could not be saved: %s", run.id, error)
                return
            older, run.snapshot, run.snapshot_seq = run.snapshot, directory, through
        if older is not None:
            await self.remove_directory(older)

    async def save_all(self) -> None:
        """Before a stop: the state of every model that changed since its last snapshot."""
        changed = [run for run in self._runs.values() if run.resident and self._has_changed(run)]
        await asyncio.gather(*(self._snapshot(run) for run in changed))

    def _has_changed(self, run: Run) -> bool:
        if run.state != "ready":
            return False
        if self._dispatcher.next_seq(run.id) - 1 > run.snapshot_seq:
            return True
        # A fresh model is made again from its seed; a loaded one must not depend on somebody's checkpoint.
        creation = messages.decode_to_engine(run.creation)
        return (
            run.snapshot is None and isinstance(creation, messages.CreateModel) and bool(creation.checkpoint)
        )

    async def finish(self, run: Run) -> None:
        """The session is over: the engine forgets the model once its operations are done."""
        if run.state == "finished":
            return
        run.state = "finished"
        await self._ledger.write(
            lambda connection: tenancy.update_model(connection, run.id, state="finished")
        )
        # Not awaited: the client need not wait for what it has queued.
        run.saving = asyncio.ensure_future(self._leave(run))

    async def _leave(self, run: Run) -> None:
        if run.resident:
            try:
                await self._engine.request(messages.DeleteModel(f"delete-{uuid.uuid4().hex}", run.id))
            except Unavailable:
                log.debug("the engine is gone, and the model with it")
            run.resident = False
        if run.snapshot is not None:
            await self.remove_directory(run.snapshot)
            run.snapshot = None

    async def remove_directory(self, directory: str) -> None:
        path = paths.resolve(self._settings.data_dir, directory)
        await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)


def new_seed() -> int:
    """Chosen here, so that a model without a seed is the same one in a replay."""
    return secrets.randbelow(1 << 31)
