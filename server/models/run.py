"""One training run, as the server holds it in memory."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row

from ...engine import messages
from ..dialect import Dialect

RLVE, WANDB = "rlve", "wandb"
"""The keys in a run's configuration of what its client asked of these two (of W&B, without the API key)."""


@dataclass(frozen=True)
class NewRun:
    """What a model is created with. `message` has no request id yet; `natural_key` makes two of these one."""

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
    """`optimizer` as `weights_info` shows it; `configuration` is `Run.configuration`."""

    message: messages.CreateModel
    optimizer: dict[str, Any]
    configuration: dict[str, Any]
    warnings: list[str]


@dataclass(eq=False)
class Run:
    """One model.

    `alias` is what its client calls it, where clients choose; clients' seq_ids begin after `seq_base`.
    `configuration` is what of its creation the engine does not know. `resident`: the engine has its state, up
    to the last operation released. `broken` says why it cannot be brought back, until the server's next
    start.
    """

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
    older_snapshot_seq: int | None = None  # None: there is nothing older that the ledger can go on from
    dialect: Dialect = "tinker"
    alias: str | None = None
    seq_base: int = 0
    configuration: dict[str, Any] = field(default_factory=dict)
    created_at: float = field(default_factory=time.time)
    base_digest: str | None = None  # None: not known
    resident: bool = False
    broken: str | None = None
    restoring: asyncio.Task | None = None
    saving: asyncio.Task | None = None
    leaving: asyncio.Task | None = None
    bytes_since_snapshot: int = 0
    used_at: float = field(default_factory=time.monotonic)  # for an operation
    found_at: float = field(default_factory=time.monotonic)  # by a request of its client
    may_be_saved: bool = True  # no engine died of it
    driven: bool = False  # the server trains it
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        """What its client calls it."""
        return self.alias or self.id

    @property
    def create_message(self) -> messages.CreateModel:
        message = messages.decode_to_engine(self.creation)
        assert isinstance(message, messages.CreateModel)
        return message


class KnownRuns:
    """The models that the server has in memory: by id, by owner, and by what their clients call them."""

    def __init__(self) -> None:
        self._by_id: dict[str, Run] = {}
        self._newest: dict[tuple[str, str], str] = {}  # owner and name: the id of its newest model
        self._of_owner: defaultdict[str, dict[str, Run]] = defaultdict(dict)

    def get(self, run_id: str) -> Run | None:
        return self._by_id.get(run_id)

    def named(self, owner: str, name: str) -> Run | None:
        """The newest model that its client calls so."""
        return self._by_id.get(self._newest.get((owner, name), ""))

    def all(self) -> list[Run]:
        return list(self._by_id.values())

    def of_owner(self, owner: str) -> list[Run]:
        return list(self._of_owner.get(owner, {}).values())

    def add(self, run: Run) -> Run:
        """Return the one object of this model: `run`, unless there is one."""
        run = self._by_id.setdefault(run.id, run)
        self._of_owner[run.owner][run.id] = run
        return run

    def call(self, run: Run) -> None:
        """The model is the newest of its name."""
        if run.alias is not None:
            self._newest[run.owner, run.alias] = run.id

    def discard(self, run: Run) -> bool:
        """Forget the model; return whether it was known."""
        if self._by_id.get(run.id) is not run:
            return False
        del self._by_id[run.id], self._of_owner[run.owner][run.id]
        if not self._of_owner[run.owner]:
            del self._of_owner[run.owner]
        if self._newest.get((run.owner, run.name)) == run.id:
            del self._newest[run.owner, run.name]
        return True


def from_row(row: Row) -> Run:
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
        row.older_snapshot,
        row.older_snapshot_seq,
        row.dialect,
        row.alias,
        row.seq_base,
        row.configuration,
        row.created_at,
        row.base_digest,
    )
