"""Training runs, as the server holds them in memory.

`KnownRuns` has them by id, by owner, and by what their clients call them.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sqlalchemy import Row

from ...engine import messages
from ..dialect import Dialect

RLVE, WANDB = "rlve", "wandb"
"""Keys of a run's configuration: its client's settings for RLVE, and for W&B (without the API key)."""


@dataclass(frozen=True)
class NewRun:
    """The parameters of a new model.

    `message` has no request id yet. Two creations with the same `natural_key` are one.
    """

    owner: str
    session_id: str
    natural_key: str
    message: messages.CreateModel
    optimizer: dict[str, Any]
    user_metadata: dict[str, Any]
    reply: dict[str, Any]
    dialect: Dialect = "tinker"
    alias: str | None = None
    configuration: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSpec:
    """The model that a client asks for. `optimizer`: as `weights_info` shows it."""

    message: messages.CreateModel
    optimizer: dict[str, Any]
    configuration: dict[str, Any]
    warnings: list[str]


@dataclass(eq=False)
class Run:
    """One model in training: its row in the ledger, and its state in the engine."""

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
    older_snapshot: str | None = None
    older_snapshot_seq: int | None = None  # None: a replay cannot begin before the newest snapshot
    dialect: Dialect = "tinker"
    alias: str | None = None  # the client's name for it, where clients choose one
    seq_base: int = 0  # the client's numbers begin after this one
    configuration: dict[str, Any] = field(default_factory=dict)  # what the engine does not need to know
    created_at: float = field(default_factory=time.time)
    base_digest: str | None = None  # None: not known
    resident: bool = False  # the engine has its state, up to the last operation released
    broken: str | None = None  # why it cannot be brought back until the server's next start
    unusable: str | None = None  # why it cannot be trained: its base model has other weights now
    restoring: asyncio.Task | None = None
    saving: asyncio.Task | None = None
    leaving: asyncio.Task | None = None
    bytes_since_snapshot: int = 0
    used_at: float = field(default_factory=time.monotonic)  # the last release of an operation
    found_at: float = field(default_factory=time.monotonic)  # the last request that named it
    may_be_saved: bool = True  # no engine died of saving it
    driven: bool = False  # the server trains it
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @cached_property
    def name(self) -> str:
        """The name that its client has for it."""
        return self.alias or self.id

    @cached_property
    def create_message(self) -> messages.CreateModel:
        message = messages.decode_to_engine(self.creation)
        assert isinstance(message, messages.CreateModel)
        return message


class KnownRuns(dict[str, Run]):
    """The models in memory, by id."""

    def __init__(self) -> None:
        super().__init__()
        self._newest: dict[tuple[str, str], str] = {}  # by owner and name: the id of the newest model
        self._of_owner: defaultdict[str, dict[str, Run]] = defaultdict(dict)

    def named(self, owner: str, name: str) -> Run | None:
        """Return the owner's newest model of that name."""
        return self.get(self._newest.get((owner, name), ""))

    def of_owner(self, owner: str) -> list[Run]:
        return list(self._of_owner.get(owner, {}).values())

    def add(self, run: Run) -> Run:
        """Add a model, unless it is known already; return its one object."""
        run = self.setdefault(run.id, run)
        self._of_owner[run.owner][run.id] = run
        return run

    def note_name(self, run: Run) -> None:
        """Make this model the one that its name refers to from now on."""
        if run.alias is not None:
            self._newest[run.owner, run.alias] = run.id

    def discard(self, run: Run) -> bool:
        """Forget the model; return whether it was known."""
        if self.get(run.id) is not run:
            return False
        del self[run.id], self._of_owner[run.owner][run.id]
        if not self._of_owner[run.owner]:
            del self._of_owner[run.owner]
        if self._newest.get((run.owner, run.name)) == run.id:
            del self._newest[run.owner, run.name]
        return True


def from_row(row: Row) -> Run:
    """Make a run from its row in the ledger, whose columns have the names of the fields."""
    return Run(**{name: getattr(row, name) for name in _COLUMNS})


_COLUMNS = (
    *("id", "owner", "session_id", "base_model", "lora", "optimizer", "user_metadata", "state", "creation"),
    *("snapshot", "snapshot_seq", "older_snapshot", "older_snapshot_seq", "dialect", "alias", "seq_base"),
    *("configuration", "created_at", "base_digest"),
)
