"""Checkpoints by their `tinker://` names: found, shared, copied and deleted. Their directories stay inside
the server.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, Row

from ...ckpt import paths
from ...engine import messages
from ..access import Quotas
from ..base_models import BaseModels
from ..errors import BadRequest, NotFound, StorageQuotaExceeded
from ..files import Disk
from ..ledger import checkpoints as rows
from ..ledger import tenancy
from ..ledger.ledger import Ledger
from ..ledger.tenancy import model_id
from .sweep import Sweep

MIN_TTL_SECONDS, MAX_TTL_SECONDS = 3600, 10 * 366 * 24 * 3600


def parse(uri: str) -> paths.CheckpointUri:
    """Parse a checkpoint's URI. Raises BadRequest saying what one looks like."""
    try:
        return paths.parse_uri(uri)
    except ValueError as error:
        raise BadRequest(str(error)) from None


def parse_short(text: str, run: str, segment: paths.Segment = "weights") -> paths.CheckpointUri:
    """Parse a URI or a shorter form of it, as `paths.parse_short`. Raises BadRequest."""
    try:
        return paths.parse_short(text, run, segment)
    except ValueError as error:
        raise BadRequest(str(error)) from None


def named(run_id: str, segment: str, name: str) -> paths.CheckpointUri:
    """Return the URI of these parts. Raises BadRequest for an invalid name."""
    try:
        return paths.CheckpointUri(run_id, paths.check_segment(segment), paths.check_name(name))
    except ValueError as error:
        raise BadRequest(f"path: {error}") from None


def expiry(ttl_seconds: int | None) -> float | None:
    """Return when a checkpoint with this time to live expires. Raises BadRequest if it is out of range."""
    if ttl_seconds is None:
        return None
    if not MIN_TTL_SECONDS <= ttl_seconds <= MAX_TTL_SECONDS:
        raise BadRequest(
            f"ttl_seconds: {ttl_seconds} is outside {MIN_TTL_SECONDS} to {MAX_TTL_SECONDS}; null is never"
        )
    return time.time() + ttl_seconds


def iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


def shown(row: Row, xorl_model: str | None = None) -> dict[str, Any]:
    """Return a checkpoint as in listings, in xorl's scheme if its clients have a name for the model."""
    uri = paths.CheckpointUri(row.run_id, row.segment, row.name)
    path = str(uri) if xorl_model is None else f"{paths.XORL_SCHEME}{xorl_model}/{uri.checkpoint_id}"
    return {
        "checkpoint_id": uri.checkpoint_id,
        "checkpoint_type": uri.checkpoint_type,
        "time": iso(row.created_at),
        "created_at": iso(row.created_at),
        "path": path,
        "tinker_path": str(uri),
        "size_bytes": row.size_bytes,
        "public": row.public,
        "user_metadata": as_strings(row.user_metadata),
        "expires_at": iso(row.expires_at),
    }


def as_strings(metadata: dict[str, Any] | None) -> dict[str, str] | None:
    """Turn all values into strings, because clients refuse a whole listing for one that is not."""
    if metadata is None:
        return None
    return {key: value if isinstance(value, str) else str(value) for key, value in metadata.items()}


class Checkpoints:
    """Finds, shares and deletes checkpoints."""

    def __init__(self, ledger: Ledger, sweep: Sweep, base_models: BaseModels | None = None):
        self._base_models = base_models or BaseModels()
        self._ledger = ledger
        self._sweep = sweep

    async def find(self, owner: str, uri: paths.CheckpointUri, shared: bool = True) -> Row:
        """Return the complete checkpoint; with `shared` also another tenant's public one. Raises NotFound."""
        row = await self._ledger.read(rows.find, uri)
        if row is None or (row.owner != owner and not (shared and row.public)):
            # The run may be an alias of the owner's model.
            row = await self._ledger.read(rows.find_by_alias, owner, uri.run, uri)
        if row is None:
            raise NotFound(
                f"unknown checkpoint {str(uri)!r}: it does not exist, has expired or is not complete yet"
            )
        return row

    def base_folder(self, row: Row) -> Path | None:
        """Return the folder of a checkpoint's base model, if that is served now."""
        base = self._base_models.get(row.base_model)
        return None if base is None or self._base_models.changed(row) else base.folder

    async def find_loadable(self, owner: str, path: str, run: str | None = None) -> Row:
        """Return a training checkpoint by its URI; with `run` also by a shorter form."""
        uri = parse(path) if run is None else parse_short(path, run)
        if uri.checkpoint_type != "training":
            raise BadRequest(
                f"path: {path!r} is not a training checkpoint; "
                "load tinker://<run>/weights/<name>, as save_weights returns"
            )
        return await self._find_usable(owner, uri, "path")

    async def find_sampleable(self, owner: str, path: str, run: str | None = None) -> Row:
        """Return a sampler checkpoint by its URI; with `run` also by a shorter form."""
        uri = parse(path) if run is None else parse_short(path, run, "sampler_weights")
        if uri.checkpoint_type != "sampler":
            raise BadRequest(
                f"model_path: {path!r} is not a sampler checkpoint; "
                "use tinker://<run>/sampler_weights/<name>, as save_weights_for_sampler returns"
            )
        return await self._find_usable(owner, uri, "model_path")

    async def _find_usable(self, owner: str, uri: paths.CheckpointUri, field: str) -> Row:
        row = await self.find(owner, uri)
        if (why := self._base_models.changed(row)) is not None:
            raise BadRequest(f"{field}: {str(uri)!r}: {why}")
        return row

    async def delete(self, owner: str, uri: paths.CheckpointUri) -> None:
        row = await self._change(owner, uri, "deleted", {}, state="deleted")
        await self._sweep.remove_deleted(row.directory)

    async def publish(self, owner: str, uri: paths.CheckpointUri, public: bool) -> None:
        await self._change(owner, uri, "published" if public else "unpublished", {}, public=public)

    async def set_ttl(self, owner: str, uri: paths.CheckpointUri, ttl_seconds: int | None) -> None:
        """Set a checkpoint's time to live. Raises BadRequest if it is out of range."""
        expires_at = expiry(ttl_seconds)
        await self._change(owner, uri, "ttl_set", {"ttl_seconds": ttl_seconds}, expires_at=expires_at)

    async def _change(
        self, owner: str, uri: paths.CheckpointUri, action: str, details: dict[str, Any], **values: Any
    ) -> Row:
        row = await self.find(owner, uri, shared=False)

        def change(connection: Connection) -> None:
            rows.change(connection, row.id, **values)
            rows.record(connection, row, action, **details)

        await self._ledger.write(change)
        return row

    async def record_read(self, owner: str, row: Row) -> None:
        """Record in the audit log that the owner's key read the checkpoint's files, or got URLs of them."""
        await self._ledger.write(rows.record, row, "read", by=owner, purpose="download")


# --- copies


def session_of(owner: str, idempotency_key: str | None) -> str:
    """Return the session of a copy into a project: the same one if the request is sent again."""
    if idempotency_key is None:
        return uuid.uuid4().hex
    return hashlib.sha256(f"{owner}\0{idempotency_key}".encode()).hexdigest()[:32]


class Copies:
    """Copies checkpoints under names of their own, which stay when the original is deleted or expires.

    The files are hard links if the file system has them, so a copy takes no room. A copy belongs to a
    training run that has nothing else and cannot be trained.
    """

    def __init__(self, ledger: Ledger, disk: Disk, quotas: Quotas, data_dir: Path):
        self._ledger = ledger
        self._disk = disk
        self._quotas = quotas
        self._data_dir = data_dir
        self._under_way: dict[str, asyncio.Task[paths.CheckpointUri]] = {}

    async def take_up(self) -> None:
        """Mark copies that an earlier server left unfinished as failed."""
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
        """Copy a checkpoint and return the copy's name; repeated for the same run, it is the same copy.

        `new_in_project`: create the session, which ends at once. Raises BadRequest if the run is something
        else, NotFound if the source is deleted meanwhile, StorageQuotaExceeded, StorageFull.
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
        limit = self._quotas[owner].checkpoint_bytes

        def begin(connection: Connection) -> bool:
            """Write the rows; return whether there is something left to copy."""
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
            await self._ledger.write(_end, operation_id=operation_id, size=size, source=source)
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
    """Link or copy a file. Complete checkpoints never change, so two may share their files."""

    def link(first: str, second: str) -> None:
        try:
            os.link(first, second)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without links
            shutil.copy2(first, second)

    shutil.copytree(source, directory, copy_function=link)
