"""Checkpoints by their `tinker://` names: found, shared, deleted. The directories behind them stay here."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row

from ...ckpt import paths
from ..base_models import BaseModels
from ..errors import BadRequest, NotFound
from ..ledger import checkpoints as rows
from ..ledger.ledger import Ledger
from .sweep import Sweep

MIN_TTL_SECONDS, MAX_TTL_SECONDS = 3600, 10 * 366 * 24 * 3600


def parse(uri: str) -> paths.CheckpointUri:
    """Raises BadRequest saying what a checkpoint's path looks like."""
    try:
        return paths.parse_uri(uri)
    except ValueError as error:
        raise BadRequest(str(error)) from None


def parse_short(text: str, run: str, segment: paths.Segment = "weights") -> paths.CheckpointUri:
    """As `paths.parse_short`. Raises BadRequest."""
    try:
        return paths.parse_short(text, run, segment)
    except ValueError as error:
        raise BadRequest(str(error)) from None


def named(run_id: str, segment: str, name: str) -> paths.CheckpointUri:
    """Raises BadRequest for a name that is none."""
    try:
        return paths.CheckpointUri(run_id, paths.check_segment(segment), paths.check_name(name))
    except ValueError as error:
        raise BadRequest(f"path: {error}") from None


def expiry(ttl_seconds: int | None) -> float | None:
    """When a checkpoint of this time to live expires. Raises BadRequest out of range."""
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
    """A checkpoint as listings show it: in xorl's scheme, where its clients have this name for the model."""
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
    """Clients refuse a whole listing for one value that is not a string."""
    if metadata is None:
        return None
    return {key: value if isinstance(value, str) else str(value) for key, value in metadata.items()}


class Checkpoints:
    def __init__(self, ledger: Ledger, sweep: Sweep, base_models: BaseModels | None = None):
        self._base_models = base_models or BaseModels()
        self._ledger = ledger
        self._sweep = sweep

    async def find(self, owner: str, uri: paths.CheckpointUri, shared: bool = True) -> Row:
        """The complete checkpoint; with `shared` also somebody's published one. Raises NotFound."""
        row = await self._ledger.read(lambda connection: rows.find(connection, uri))
        if row is None or (row.owner != owner and not (shared and row.public)):
            # The run may be what the owner calls its model.
            row = await self._ledger.read(
                lambda connection: rows.find_by_alias(connection, owner, uri.run, uri)
            )
        if row is None:
            raise NotFound(
                f"unknown checkpoint {str(uri)!r}: it does not exist, has expired or is not complete yet"
            )
        return row

    async def find_loadable(self, owner: str, path: str, run: str | None = None) -> Row:
        """A training checkpoint by its URI; one of `run` also by less of it."""
        uri = parse(path) if run is None else parse_short(path, run)
        if uri.checkpoint_type != "training":
            raise BadRequest(
                f"path: {path!r} is not a training checkpoint; "
                "load tinker://<run>/weights/<name>, as save_weights returns"
            )
        return await self._find_usable(owner, uri, "path")

    async def find_sampleable(self, owner: str, path: str, run: str | None = None) -> Row:
        """A sampler checkpoint by its URI; one of `run` also by less of it."""
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
        """Raises BadRequest out of range."""
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
        """The owner's key had the checkpoint's files, or URLs of them."""
        await self._ledger.write(
            lambda connection: rows.record(connection, row, "read", by=owner, purpose="download")
        )
