"""Copies of checkpoints under a name of their own: they stay when the first one is deleted or expires.

The files are hard links where the file system has them, so a copy takes no room. A copy belongs to a
training run that holds nothing else and cannot be trained on.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import uuid
from functools import partial
from pathlib import Path

import msgspec
from sqlalchemy import Connection, Row

from ...ckpt import paths
from ...engine import messages
from ..access.quotas import Quotas
from ..errors import BadRequest, NotFound, StorageQuotaExceeded
from ..files import Disk
from ..ledger import checkpoints as rows
from ..ledger import tenancy
from ..ledger.ledger import Ledger
from ..ledger.tenancy import model_id
from .checkpoints import expiry


def session_of(owner: str, idempotency_key: str | None) -> str:
    """The session that a copy into a project makes: the same one when the request is sent again."""
    if idempotency_key is None:
        return uuid.uuid4().hex
    return hashlib.sha256(f"{owner}\0{idempotency_key}".encode()).hexdigest()[:32]


class Copies:
    def __init__(self, ledger: Ledger, disk: Disk, quotas: Quotas, data_dir: Path):
        self._ledger = ledger
        self._disk = disk
        self._quotas = quotas
        self._data_dir = data_dir
        self._under_way: dict[str, asyncio.Task[paths.CheckpointUri]] = {}

    async def take_up(self) -> None:
        """At start: nothing copies, so what was not copied to its end never will be."""
        await self._ledger.write(rows.fail_copies)

    async def copy(
        self,
        owner: str,
        source: Row,
        session_id: str,
        model_seq_id: int,
        new_in_project: str | None,
        ttl_seconds: int | None,
    ) -> paths.CheckpointUri:
        """The copy's name; asked again for the same run, the same one. `new_in_project`: the session is made,
        and ends at once.

        Raises BadRequest if the run is something else, NotFound if the source is deleted meanwhile,
        StorageQuotaExceeded, StorageFull.
        """
        run_id = model_id(session_id, model_seq_id)
        task = self._under_way.get(run_id)
        if task is None:
            expires_at = expiry(ttl_seconds)
            copying = self._copy(owner, source, session_id, run_id, new_in_project, expires_at)
            task = self._under_way[run_id] = asyncio.ensure_future(copying)
            task.add_done_callback(lambda _: self._under_way.pop(run_id))
        return await asyncio.shield(task)

    async def _copy(
        self,
        owner: str,
        source: Row,
        session_id: str,
        run_id: str,
        new_in_project: str | None,
        expires_at: float | None,
    ) -> paths.CheckpointUri:
        uri = paths.CheckpointUri(run_id, source.segment, source.name)
        directory = paths.new_directory(run_id, source.segment, source.name)
        operation_id = f"copy-{uuid.uuid4().hex}"
        limit = self._quotas.of(owner).checkpoint_bytes

        def begin(connection: Connection) -> bool:
            """Whether there is something left to copy."""
            run = tenancy.find_model(connection, run_id)
            if run is not None and not _is_copy(run, source):
                raise BadRequest(
                    "model_seq_id: this session has another run of that number; use the next one"
                )
            if run is not None and rows.find(connection, uri) is not None:
                return False
            self._disk.require_room()
            used = rows.stored_bytes(connection, owner)
            if used + (source.size_bytes or 0) > limit:
                raise StorageQuotaExceeded(
                    f"the checkpoints of this key's tenant take {used} bytes, the copy another "
                    f"{source.size_bytes}, its quota is {limit}; delete some, or give them a ttl"
                )
            if run is None:
                _add_run(connection, owner, source, session_id, run_id, new_in_project)
            rows.add(
                connection,
                uri,
                owner=owner,
                operation_id=operation_id,
                directory=directory,
                base_model=source.base_model,
                base_digest=source.base_digest,
                lora=source.lora,
                optimizer=source.optimizer,
                user_metadata=source.user_metadata,
                expires_at=expires_at,
            )
            return True

        if not await self._ledger.write(begin):
            return uri
        size: int | None = None
        try:
            first, second = (paths.resolve(self._data_dir, key) for key in (source.directory, directory))
            await asyncio.to_thread(_link, first, second)
            size = source.size_bytes or 0
        except FileNotFoundError:
            raise NotFound("source_path: the checkpoint was deleted while it was copied") from None
        finally:
            await self._ledger.write(partial(_end, operation_id=operation_id, size=size, source=source))
        return uri


def _end(connection: Connection, operation_id: str, size: int | None, source: Row) -> None:
    copied = rows.settle(connection, operation_id, size)
    if copied is not None:
        path = str(paths.CheckpointUri(source.run_id, source.segment, source.name))
        rows.record(connection, copied, "copied", source_path=path, size_bytes=size)


def _is_copy(run: Row, of: Row) -> bool:
    creation = messages.decode_to_engine(run.creation)
    assert isinstance(creation, messages.CreateModel)
    return run.state == "finished" and creation.checkpoint == of.directory


def _add_run(
    connection: Connection, owner: str, source: Row, session_id: str, run_id: str, new_in_project: str | None
) -> None:
    if new_in_project is not None:
        tenancy.add_session(
            connection, id=session_id, owner=owner, tags=[], user_metadata={}, project_id=new_in_project
        )
        tenancy.finish_session(connection, session_id, "success", "it holds a copied checkpoint")
    creation = messages.CreateModel(
        request_id="",
        model_id=run_id,
        base_model=source.base_model,
        lora=None if source.lora is None else msgspec.convert(source.lora, messages.LoraSpec),
        optimizer=source.optimizer["type"],
        checkpoint=source.directory,
        optimizer_state=False,
    )
    tenancy.add_model(
        connection,
        id=run_id,
        owner=owner,
        session_id=session_id,
        base_model=source.base_model,
        base_digest=source.base_digest,
        lora=source.lora,
        optimizer=source.optimizer,
        user_metadata={},
        state="finished",
        creation=messages.encode(creation),
    )


def _link(source: Path, directory: Path) -> None:
    """Checkpoints never change once they are complete, so two may share their files."""

    def link(first: str, second: str) -> None:
        try:
            os.link(first, second)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without links
            shutil.copy2(first, second)

    shutil.copytree(source, directory, copy_function=link)
