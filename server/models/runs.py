"""Training runs: the models that clients create, and whether the engine has them.

A run's state is a fold over its operations. The engine holds the states of some runs; one that it does not
hold (after a restart of the engine or of the server, or when its client was silent for long) is brought back
when its next operation is due (recovery.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque

import msgspec
from sqlalchemy import Connection, Row

from ...engine import messages
from ..access import Quotas
from ..base_models import BaseModels
from ..dialect import DIALECT_RULES
from ..errors import ApiError, BadRequest, Gone, NotFound, Unavailable
from ..events import Event
from ..ledger import operations as operation_rows
from ..ledger import plugins as plugin_rows
from ..ledger import tenancy
from ..ledger.ledger import Ledger
from ..operations.operation import Dispatcher, Operation, Submission
from ..operations.operations import Operations
from ..supervision.engine_process import Lane
from ..supervision.supervisor import Supervisor
from .recovery import Recovery, Snapshots
from .run import KnownRuns, NewRun, Run, from_row

log = logging.getLogger("tinsmith.runs")

_MOST_OVER = 1024  # models that have finished, and are remembered
_REMEMBERED_SECONDS = 3600.0  # models that rest; far longer than any request holds on to one


class Runs:
    """The models of all tenants.

    Events: `created(run)` for a new model, `opened(run)` for one that is held in memory from now on,
    `ending(run)` for one that is to end, `finished(run_id)` for one of which nothing more will come.
    """

    def __init__(
        self,
        ledger: Ledger,
        engine: Supervisor,
        operations: Operations,
        dispatcher: Dispatcher,
        known: KnownRuns,
        recovery: Recovery,
        snapshots: Snapshots,
        quotas: Quotas,
        base_models: BaseModels,
    ):
        self._ledger = ledger
        self._engine = engine
        self._operations = operations
        self._dispatcher = dispatcher
        self._known = known
        self._recovery = recovery
        self._snapshots = snapshots
        self._quotas = quotas
        self._base_models = base_models
        self._over: deque[Run] = deque()  # models that have finished, the oldest first
        self.created: Event[[Run]] = Event()
        self.opened: Event[[Run]] = Event()
        self.ending: Event[[Run]] = Event()
        self.finished: Event[[str]] = Event()
        dispatcher.released.subscribe(self._release)
        operations.finished.subscribe(self._note_creation, "create_model")

    # --- finding and creating

    async def find(self, owner: str, run_id: str) -> Run:
        """Find a model by its id, or the newest one of that name.

        Raises NotFound for what does not exist or is not the owner's.
        """
        run = self._known.get(run_id) or self._known.named(owner, run_id)
        if run is None or run.owner != owner:
            row = await self._ledger.read(tenancy.find_owned, owner, run_id)
            if row is None:
                raise NotFound(f"unknown model {run_id!r}: create it with create_model first")
            run = await self._open(row)
            if run.alias == run_id:
                self._known.note_name(run)
        run.found_at = time.monotonic()
        return run

    def known(self, run_id: str) -> Run | None:
        """Return a model that has been used since the server's start."""
        return self._known.get(run_id)

    async def numbered(self, owner: str, run_id: str, seq_id: int) -> tuple[str, int]:
        """Translate a client's `seq_id` into the model's id and its own count of operations.

        Raises NotFound, or BadRequest for a model that the server trains.
        """
        run = await self.find(owner, run_id)
        if run.driven:
            raise BadRequest(f"model {run_id!r}: the server numbers its operations")
        return run.id, run.seq_base + seq_id

    async def restart_numbers(self, run: Run) -> None:
        """Begin the client's numbers at 1 again: it has opened the model anew."""
        base = self._dispatcher.last_seq(run.id)
        if base != run.seq_base:
            run.seq_base = base
            await self._ledger.write(tenancy.update_model, run.id, seq_base=base)

    async def find_live(self, owner: str, run_id: str) -> Run:
        """Find a model that has not ended, as `find` does.

        For a model that was deleted, or whose session has finished, raises what its dialect says of
        what is gone: Gone or NotFound.
        """
        run = await self.find(owner, run_id)
        if run.state == "finished":
            raise _gone(run, run_id)
        return run

    async def find_trainable(self, owner: str, run_id: str) -> Run:
        """Find a model that can be trained, as `find_live` does.

        Raises BadRequest for a model whose creation failed, or whose base model has other weights
        now.
        """
        run = self._known.get(run_id)
        if run is None or run.owner != owner:
            run = await self.find(owner, run_id)
        run.found_at = time.monotonic()
        if run.state == "finished":
            raise _gone(run, run_id)
        if run.state == "failed":
            raise BadRequest(f"model {run_id!r} could not be created; its create_model request says why")
        if run.unusable is not None:
            raise BadRequest(f"model {run_id!r}: {run.unusable}, or create another model")
        return run

    def last_seq(self, run: Run) -> int:
        return self._dispatcher.last_seq(run.id)

    def reserve_seq(self, run: Run) -> int:
        return self._dispatcher.reserve(run.id)

    async def create(self, new: NewRun) -> Operation:
        """Register a model and ask the engine for it."""
        message = new.message
        lora = None if message.lora is None else msgspec.structs.asdict(message.lora)
        run: Run | None = None
        limit = self._quotas[new.owner].metadata_bytes

        def also(connection: Connection, request_id: str) -> None:
            nonlocal run
            tenancy.require_room(connection, new.owner, limit)
            if tenancy.find_model(connection, message.model_id) is not None:
                raise BadRequest(
                    "model_seq_id: this session has a copied checkpoint of that number; use the next one"
                )
            creation = messages.encode(msgspec.structs.replace(message, request_id=request_id))
            tenancy.add_model(
                connection,
                id=message.model_id,
                owner=new.owner,
                session_id=new.session_id,
                base_model=message.base_model,
                lora=lora,
                optimizer=new.optimizer,
                user_metadata=new.user_metadata,
                state="creating",
                creation=creation,
                dialect=new.dialect,
                alias=new.alias,
                configuration=new.configuration,
            )
            if (rlve := new.configuration.get("rlve")) is not None:
                plugin_rows.add_run(connection, message.model_id, rlve["difficulties"])
            row = tenancy.find_model(connection, message.model_id)
            assert row is not None
            run = from_row(row)

        operation = await self._operations.accept(
            Submission(
                new.owner,
                "create_model",
                new.natural_key,
                lambda request_id: msgspec.structs.replace(message, request_id=request_id),
                new.reply,
                message.model_id,
                also=also,
                dialect=new.dialect,
            )
        )
        if run is not None:
            run = self._known.add(run)
            self._known.note_name(run)
            self._dispatcher.open(run.id, 1)
            run.resident = operation.sent_in == self._engine.life
            if operation.answer is not None:
                self._note_creation(operation)
            elif not run.resident:
                self._recovery.bring_back(run)
            self.created(run)
            self.opened(run)
        return operation

    def _note_creation(self, operation: Operation) -> None:
        run = self._known.get(operation.model_id)
        if run is not None and run.state == "creating":
            run.state = "ready" if isinstance(operation.answer, messages.Done) else "failed"

    async def _open(self, row: Row) -> Run:
        """Load a run from the ledger, and let it continue after its last finished operation."""
        early = await self._ledger.read(operation_rows.early_arrivals, row.id, row.executed_seq)
        if (known := self._known.get(row.id)) is not None:
            return known
        run = from_row(row)
        run.broken = run.unusable = self._base_models.changed(run)
        self._known.add(run)
        self._dispatcher.open(row.id, row.executed_seq + 1)
        for arrival in early:
            self._dispatcher.add(self._operations.load(arrival))
        self.opened(run)
        return run

    async def resume(self) -> None:
        """Resume the operations that were accepted before the server's start and have no answer yet."""
        unfinished = await self._ledger.read(operation_rows.unfinished)
        for row in unfinished:
            operation = self._operations.load(row)
            if operation.model_id:
                run = await self.find(operation.owner, operation.model_id)
                if run.state == "finished" and run.leaving is None:
                    run.leaving = asyncio.ensure_future(self._finish(run))
        self._recovery.take_up()
        if unfinished:
            log.info("%d unfinished operations taken up again", len(unfinished))

    # --- releasing

    def _release(self, operation: Operation) -> None:
        run = self._known[operation.model_id]
        run.used_at = time.monotonic()
        if not run.resident or not operation.payload_bytes:
            self._recovery.bring_back(run)
            return
        self._engine.outbox.put(Lane(run.id), operation.request_id, operation.payload_bytes)
        run.bytes_since_snapshot += operation.payload_bytes
        since = operation.seq_id - run.snapshot_seq
        settings = self._snapshots.settings
        if since >= settings.snapshot_operations or run.bytes_since_snapshot >= settings.snapshot_bytes:
            self._snapshots.take_if_due(run, operation.seq_id)

    async def bring_back(self, owner: str, run_id: str) -> bool:
        """Restore the owner's model in the engine, unless it is there. Raises NotFound.

        Returns whether the engine has it, or has been sent all that it needs for it.
        """
        return await self._recovery.bring_back_now(await self.find(owner, run_id))

    # --- leaving

    async def save_all(self) -> None:
        """Save the state of every model that has changed since its last snapshot, before a stop."""
        await self._snapshots.take_all(list(self._known.values()))

    def resident(self) -> list[Run]:
        """Return the models whose states the engine has."""
        return [run for run in self._known.values() if run.resident]

    def is_alive(self, run: Run) -> bool:
        """Return whether the engine has the model, or will have it without another operation."""
        return run.resident or run.state == "creating" or bool(self._operations.unanswered(run.id))

    def alive(self, owner: str) -> list[Run]:
        return [run for run in self._known.of_owner(owner) if self.is_alive(run)]

    async def rest(self, run: Run) -> None:
        """Save the state of a silent client's model, and have the engine forget it until it is needed."""
        if self._operations.unanswered(run.id) or run.state != "ready":
            return
        if await self._snapshots.take_if_changed(run):
            log.info("model %s rests: its client is silent", run.id)
            await self._leave(run)

    def forget_unused(self) -> None:
        """Forget the models that are at rest and that nobody has asked for in an hour.

        `find` reads them from the ledger again.
        """
        since = time.monotonic() - _REMEMBERED_SECONDS
        unused = [run for run in self._known.values() if max(run.found_at, run.used_at) < since]
        for run in unused:
            under_way = [
                task for task in (run.restoring, run.saving, run.leaving) if task and not task.done()
            ]
            # That an engine died of a model is recorded only in memory.
            is_blamed = run.broken is not None or not run.may_be_saved
            if not (self.is_alive(run) or run.driven or under_way or is_blamed):
                self._forget(run)

    async def finish(self, run: Run) -> None:
        """End a model: the engine forgets it once its operations are done."""
        if run.state == "finished":
            return
        self.ending(run)
        run.state = "finished"
        now = time.time()
        await self._ledger.write(tenancy.update_model, run.id, state="finished", last_request_at=now)
        # Not awaited: the client need not wait for what it has queued.
        run.leaving = asyncio.ensure_future(self._finish(run))

    async def _finish(self, run: Run) -> None:
        for operation in self._operations.unanswered(run.id):
            await operation.finished.wait()
        if self._operations.unanswered(run.id):
            return  # the server stops, and its next start goes on here
        await self._leave(run)
        self.finished(run.id)
        await self._snapshots.remove(run)
        self._over.append(run)
        while len(self._over) > _MOST_OVER:
            self._forget(self._over.popleft())

    def _forget(self, run: Run) -> None:
        """Forget a model that the ledger knows and that nothing here needs."""
        if self._known.discard(run):
            self._dispatcher.close(run.id)

    async def _leave(self, run: Run) -> None:
        if not run.resident:
            return
        run.resident = False
        with contextlib.suppress(Unavailable):  # the engine is gone, and the model with it
            await self._engine.request(messages.DeleteModel(f"delete-{run.id}", run.id))


def _gone(run: Run, run_id: str) -> ApiError:
    """Return the error for a model that has ended, as its dialect reports it."""
    kind = Gone if DIALECT_RULES[run.dialect].unknown_status == Gone.status else NotFound
    return kind(
        f"model {run_id!r} was deleted, or its session has finished; create another with create_model"
    )
