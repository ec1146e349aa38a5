"""Models that their clients name: made at the first asking, opened again at the next.

A name is a tenant's own, and means the newest model of it. What is unloaded is over: the name then makes a
new one.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ...ckpt import paths
from ...engine import messages
from ..dialect import Dialect
from ..errors import BadRequest, NotFound
from ..ledger.tenancy import model_id
from ..operations.operation import Operation
from ..operations.operations import Operations
from .admission import Admission
from .run import RLVE, ModelSpec, NewRun, Run
from .runs import Runs
from .sessions import Sessions

_OVER = ("finished", "failed")


@dataclass(frozen=True)
class Named:
    """What is asked for by a name; None: a model of no name, in a session of its own."""

    owner: str
    name: str | None
    spec: ModelSpec
    dialect: Dialect
    reply: dict[str, Any]
    user_metadata: dict[str, Any] = field(default_factory=dict)
    session: dict[str, Any] = field(default_factory=dict)  # what it says of its new session
    any_alpha: bool = False  # whether it leaves the adapter's scale to the model that is there


class NamedModels:
    def __init__(self, runs: Runs, sessions: Sessions, operations: Operations, admission: Admission):
        self._runs = runs
        self._sessions = sessions
        self._operations = operations
        self._admission = admission
        self._one_at_a_time = asyncio.Lock()

    async def open(self, asked: Named) -> Operation:
        """Raises BadRequest for a name that has another model."""
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
    """Without the seed, which says only how it began."""
    if lora is None:
        return None
    return {name: value for name, value in msgspec.structs.asdict(lora).items() if name != "seed"}


def check_name(name: str) -> None:
    """Raises BadRequest for what no model can be called."""
    try:
        paths.check_id(name)
    except ValueError as error:
        raise BadRequest(f"model_id: {error}") from None


def described(spec: ModelSpec, router_address: str) -> dict[str, Any]:
    """The answer to a creation, without the model's id."""
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
    """Empty without any."""
    return {"warning_message": "; ".join(spec.warnings)} if spec.warnings else {}
