"""A model's weights on their way into checkpoints."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from ...ckpt import paths
from ...engine import messages
from ..backend import Backend
from ..checkpoints.checkpoints import expiry, named
from ..dialect import POINTS
from ..errors import StorageQuotaExceeded
from ..ledger import checkpoints as rows
from ..operations.operation import Operation
from .run import Run
from .submits import submit


def spelled(run: Run, uri: paths.CheckpointUri) -> str:
    """A checkpoint's path as the model's client spells it."""
    return f"{POINTS[run.dialect].scheme}{run.name}/{uri.checkpoint_id}"


def saved(kind: str, run: Run, uri: paths.CheckpointUri) -> dict[str, Any]:
    """The answer to a save, but for its size."""
    return {
        "type": kind,
        "path": spelled(run, uri),
        "name": uri.name,
        "checkpoint_path": spelled(run, uri),
        "tinker_path": str(uri),
        "xorl_path": f"{paths.XORL_SCHEME}{run.name}/{uri.checkpoint_id}",
    }


async def save_state(
    backend: Backend, run: Run, name: str, seq_id: int | None = None, **fields: Any
) -> Operation:
    """The training state under this name; `fields` are those of `new_checkpoint`. Raises ApiError."""
    uri = named(run.id, "weights", name)
    directory = paths.new_directory(uri.run, uri.segment, uri.name)
    return await submit(
        backend,
        run,
        "save_weights",
        seq_id,
        messages.SaveState(request_id="", model_id=run.id, directory=directory),
        saved("save_weights", run, uri),
        new_checkpoint(backend, run, uri, directory, **fields),
    )


def new_checkpoint(
    backend: Backend,
    run: Run,
    uri: paths.CheckpointUri,
    directory: str,
    ttl_seconds: int | None = None,
    overwrite: bool = False,
    user_metadata: dict[str, str] | None = None,
):
    """Reserves the name in the transaction of the submit; a name that is taken fails the operation.

    Raises StorageQuotaExceeded there, until the tenant deletes checkpoints.
    """
    expires_at = expiry(ttl_seconds)
    limit = backend.quotas.of(run.owner).checkpoint_bytes

    def also(connection: Connection, request_id: str) -> messages.Failed | None:
        # What a name of a model means is one thing, also when the model was unloaded and made again.
        taken = rows.is_taken(connection, uri) or (
            run.alias is not None and rows.find_by_alias(connection, run.owner, run.alias, uri) is not None
        )
        if not overwrite and taken:
            message = f"checkpoint {spelled(run, uri)!r} exists; choose another name or set overwrite"
            return messages.Failed(request_id, message, "user")
        if (used := rows.stored_bytes(connection, run.owner)) >= limit:
            raise StorageQuotaExceeded(
                f"the checkpoints of this key's tenant take {used} bytes, its quota is {limit}; delete some, "
                "or give them a ttl"
            )
        rows.add(
            connection,
            uri,
            owner=run.owner,
            operation_id=request_id,
            directory=directory,
            base_model=run.base_model,
            lora=run.lora,
            optimizer=run.optimizer,
            user_metadata=user_metadata,
            expires_at=expires_at,
        )
        return None

    return also
