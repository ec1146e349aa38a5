"""Sessions: what a client opens first, and what its models and samplers belong to.

A session that gives no sign of life (a heartbeat, or an operation of one of its models) for
`session_idle_seconds` keeps all it has, but its models leave the engine: their states are saved, and they
come back at their next operation. It is not over: a client that slept goes on where it was.

Clients may also name their models: the first request of a name creates a model, and later ones find it.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sqlalchemy import Connection, Row

from ...ckpt import paths
from ...engine import messages
from ..access import Quotas
from ..dialect import Dialect
from ..errors import ApiError, BadRequest, Gone, NotFound
from ..ledger import accounts, tenancy
from ..ledger import operations as operation_rows
from ..ledger.ledger import Ledger
from ..ledger.tenancy import model_id
from ..operations.operation import Operation
from ..operations.operations import Operations
from .run import RLVE, ModelSpec, NewRun, Run
from .runs import Runs
from .samplers import Recent, Samplers
from .submits import Admission

log = logging.getLogger("tinsmith.sessions")

_NAMES = uuid.UUID("5f2c4d0e-3a8b-4d57-9a51-6c1b0f7e2d94")
_REMEMBERED = 65_536  # sessions; others are read from the ledger again
_HEARTBEAT_WRITTEN_EVERY = 60.0  # seconds; clients send one every ten


def shown_id(row: Row) -> str:
    """Return what a session is called in listings: its client's name for it, or its id."""
    name = row.display_name
    return name if name and id_of_name(row.owner, name) == row.id else row.id


def id_of_name(owner: str, name: str) -> str:
    """Return the id of the session that a tenant's client calls `name`. Each tenant has names of its own."""
    return uuid.uuid5(_NAMES, f"{owner}\0{name}").hex


class Sessions:
    """Creates, finds and ends sessions, and lets the models of silent ones rest."""

    def __init__(self, ledger: Ledger, runs: Runs, samplers: Samplers, quotas: Quotas, idle_seconds: float):
        self._ledger = ledger
        self._quotas = quotas
        self._idle_seconds = idle_seconds
        self._heard: Recent[str, float] = Recent(_REMEMBERED)  # the last heartbeat, of time.monotonic
        self._runs = runs
        self._samplers = samplers
        self._active: Recent[str, tuple[str, float]] = Recent(_REMEMBERED)  # owner, last heartbeat written

    async def create(self, owner: str, fields: dict[str, Any], session_id: str | None = None) -> str:
        """Create a session, under an id of its own or one of `id_of_name`; return the id.

        Raises QuotaExceeded.
        """
        identifier = session_id or uuid.uuid4().hex
        limit = self._quotas[owner].metadata_bytes

        def add(connection: Connection) -> None:
            if session_id is not None and tenancy.find_session(connection, session_id) is not None:
                return
            tenancy.require_room(connection, owner, limit)
            tenancy.add_session(connection, id=identifier, owner=owner, **fields)
            accounts.audit(connection, owner, "session_created", session_id=identifier)

        await self._ledger.write(add)
        self._active[identifier] = (owner, time.time())
        return identifier

    async def open_named(self, owner: str, name: str, fields: dict[str, Any]) -> str:
        """Return the id of an active session that the client calls `name`, which is created if there is none.

        Raises NotFound for the id of another tenant's session, BadRequest for a name that cannot be one or a
        session that has finished.
        """
        try:
            return await self.require_active(owner, name)
        except NotFound:
            if await self._ledger.read(tenancy.find_session, name) is not None:
                raise
        try:
            paths.check_id(name)
        except ValueError as error:
            raise BadRequest(f"session_id: {error}") from None
        return await self.create(owner, {"display_name": name} | fields, id_of_name(owner, name))

    async def find(self, owner: str, session_id: str) -> Row:
        """Find a session by its id, or by the name that its client chose.

        Raises NotFound for what does not exist or is not the owner's.
        """

        def read(connection: Connection) -> Row | None:
            for identifier in (session_id, id_of_name(owner, session_id)):
                row = tenancy.find_session(connection, identifier)
                if row is not None and row.owner == owner:
                    return row
            return None

        found = await self._ledger.read(read)
        if found is not None:
            return found
        raise NotFound(f"unknown session {session_id!r}: create one with create_session")

    async def require_active(self, owner: str, session_id: str) -> str:
        """Return the id of a session, given that or its client's name.

        Raises NotFound, or BadRequest for a session that has finished.
        """
        for identifier in (session_id, id_of_name(owner, session_id)):
            known = self._active.get(identifier, None)
            if known is not None and known[0] == owner:
                return identifier
        row = await self.find(owner, session_id)
        if row.finished_at is not None:
            raise BadRequest(f"session {session_id!r} has finished; create a new one")
        self._active[row.id] = (owner, row.last_heartbeat_at)
        return row.id

    async def of_client(self, owner: str, session_id: str, dialect: Dialect | None) -> str:
        """Return the id of the active session that a client names.

        Clients of tinkercloud may name one that they have not created: it is created then. Raises NotFound or
        BadRequest.
        """
        if (dialect or "tinkercloud") != "tinkercloud":
            return await self.require_active(owner, session_id)
        fields = {"tags": [], "user_metadata": {}, "dialect": "tinkercloud"}
        return await self.open_named(owner, session_id, fields)

    async def heartbeat(self, owner: str, session_id: str) -> None:
        """Note that the session's client is alive.

        Raises Gone for a session that has finished: the client then stops sending heartbeats.
        """
        try:
            session_id = await self.require_active(owner, session_id)
        except BadRequest as error:
            raise Gone(error.message) from None
        self._heard[session_id] = time.monotonic()
        now = time.time()
        known = self._active.get(session_id, None)
        if known is None or now - known[1] >= _HEARTBEAT_WRITTEN_EVERY:
            self._active[session_id] = (owner, now)
            await self._ledger.write(tenancy.heartbeat, session_id, now)

    async def finish(self, owner: str, session_id: str, reason: str, detail: str | None) -> None:
        """End a session: its models leave the engine, unnamed samplers go, checkpoints stay."""
        session_id = (await self.find(owner, session_id)).id
        self._active.discard(session_id)
        self._heard.discard(session_id)

        def end(connection: Connection) -> None:
            if tenancy.finish_session(connection, session_id, reason, detail):
                accounts.audit(connection, owner, "session_finished", session_id=session_id, reason=reason)

        await self._ledger.write(end)
        for row in await self._ledger.read(tenancy.models_of_session, session_id):
            await self._runs.finish(await self._runs.find(owner, row.id))
        await self._samplers.forget_unnamed(session_id)
        await self._ledger.write(operation_rows.forget_custom_losses, session_id)

    async def assign_project(self, owner: str, session_id: str, project_id: str) -> None:
        session_id = (await self.find(owner, session_id)).id

        def assign(connection: Connection) -> None:
            tenancy.assign_project(connection, session_id, project_id)
            accounts.audit(
                connection, owner, "project_session_assigned", session_id=session_id, project_id=project_id
            )

        await self._ledger.write(assign)

    async def rest_silent(self) -> None:
        """Save the models of silent sessions, and have the engine forget them."""
        silent_since = time.monotonic() - self._idle_seconds
        for run in self._runs.resident():
            if max(run.used_at, self._heard.get(run.session_id, 0.0)) < silent_since:
                await self._runs.rest(run)

    async def rest_silent_forever(self) -> None:
        while True:
            await asyncio.sleep(min(30.0, self._idle_seconds / 4))
            try:
                await self.rest_silent()
                self._runs.forget_unused()
            except ApiError as error:
                log.error("the models of silent sessions could not be saved: %s", error)


_OVER = ("finished", "failed")


@dataclass(frozen=True)
class Named:
    """A model that a client asks for by a name; None: one without a name, in a session of its own."""

    owner: str
    name: str | None
    spec: ModelSpec
    dialect: Dialect
    reply: dict[str, Any]
    user_metadata: dict[str, Any] = field(default_factory=dict)
    session: dict[str, Any] = field(default_factory=dict)  # what it says of its new session
    any_alpha: bool = False  # whether it leaves the adapter's scale to the model that is there


class NamedModels:
    """Opens models that clients name: creates one at the first request, and finds it again later.

    A name is the tenant's own, and means its newest model. After the model is unloaded, the name makes a
    new one.
    """

    def __init__(self, runs: Runs, sessions: Sessions, operations: Operations, admission: Admission):
        self._runs = runs
        self._sessions = sessions
        self._operations = operations
        self._admission = admission
        self._one_at_a_time = asyncio.Lock()

    async def open(self, asked: Named) -> Operation:
        """Return the creation of the model of that name. Raises BadRequest if that one is different."""
        async with self._one_at_a_time:
            run = await self._alive(asked)
            if run is None:
                return await self._create(asked)
            _require_alike(run, asked.spec, asked.any_alpha)
            await self._runs.restart_numbers(run)
            first = await self._operations.find(asked.owner, run.create_message.request_id)
            assert first is not None  # the ledger keeps creations
            return first

    async def _alive(self, asked: Named) -> Run | None:
        if asked.name is None:
            return None
        try:
            run = await self._runs.find(asked.owner, asked.name)
        except NotFound:
            return None
        return run if run.state not in _OVER or run.id == asked.name else None

    async def _create(self, asked: Named) -> Operation:
        fields = {"tags": [], "user_metadata": {}, "dialect": asked.dialect} | asked.session
        session_id = await self._sessions.create(asked.owner, fields)
        identifier = model_id(session_id, 0)
        with self._admission.model(asked.owner, identifier, self._runs.alive(asked.owner)):
            return await self._runs.create(
                NewRun(
                    asked.owner,
                    session_id,
                    f"create/{session_id}/0",
                    msgspec.structs.replace(asked.spec.message, model_id=identifier),
                    asked.spec.optimizer,
                    asked.user_metadata,
                    asked.reply | {"model_id": asked.name or identifier},
                    asked.dialect,
                    asked.name,
                    asked.spec.configuration,
                )
            )


def _require_alike(run: Run, spec: ModelSpec, any_alpha: bool) -> None:
    if run.state in _OVER:
        raise BadRequest(f"model {run.name!r} is over; choose another model_id")
    there, asked = run.create_message, spec.message
    for field_name in ("base_model", "optimizer", "grad_normalization", "target_alignment"):
        old, new = getattr(there, field_name), getattr(asked, field_name)
        if old != new:
            raise BadRequest(
                f"model {run.name!r} is there already, with {field_name} {old!r} and not {new!r}; "
                "call unload_model first, or choose another model_id"
            )
    rlve = spec.configuration.get(RLVE)
    if rlve is not None and rlve["config"] != run.configuration.get(RLVE, {}).get("config"):
        raise BadRequest(
            f"model {run.name!r} is there already, with another rlve_config; call unload_model first, or "
            "choose another model_id"
        )
    shapes = [_shape(lora) for lora in (there.lora, asked.lora)]
    ignored = {"alpha"} if any_alpha else set()
    old_shape, new_shape = ({k: v for k, v in (s or {}).items() if k not in ignored} for s in shapes)
    if old_shape != new_shape:
        raise BadRequest(
            f"model {run.name!r} is there already, with lora_config {shapes[0]} and not "
            f"{shapes[1]}; call unload_model first, or choose another model_id"
        )


def _shape(lora: messages.LoraSpec | None) -> dict[str, Any] | None:
    """Return what makes two adapters alike: everything but the seed, which says only how it began."""
    if lora is None:
        return None
    return {name: value for name, value in msgspec.structs.asdict(lora).items() if name != "seed"}


def check_name(name: str) -> None:
    """Raise BadRequest for a name that no model can have."""
    try:
        paths.check_id(name)
    except ValueError as error:
        raise BadRequest(f"model_id: {error}") from None


def described(spec: ModelSpec, router_address: str) -> dict[str, Any]:
    """Describe a creation, without the model's id."""
    message = spec.message
    return {
        "type": "create_model",
        "status": "ready",
        "base_model": message.base_model,
        "lora_config": None if message.lora is None else msgspec.structs.asdict(message.lora),
        "optimizer_config": spec.optimizer,
        "grad_normalization": message.grad_normalization,
        "target_alignment": message.target_alignment,
        "router_address": router_address,
    } | warnings_of(spec)


def warnings_of(spec: ModelSpec) -> dict[str, str]:
    """Return the warnings as a field of an answer; nothing if there are none."""
    return {"warning_message": "; ".join(spec.warnings)} if spec.warnings else {}
