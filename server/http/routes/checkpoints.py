"""Training runs, and their checkpoints: listed, described, shared, deleted, downloaded."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header
from fastapi.responses import FileResponse, Response, StreamingResponse
from sqlalchemy import Row

from ....ckpt import paths
from ....engine import messages
from ...access import Caller, UrlSigner
from ...checkpoints import Checkpoints, Copies, as_strings, iso, named, parse, parse_short, session_of, shown
from ...checkpoints.archive import Archive, files
from ...dialect import Dialect
from ...errors import BadRequest, NotFound, Unavailable
from ...files import Disk
from ...ledger import checkpoints as rows
from ...ledger import tenancy
from ...ledger.ledger import Ledger
from ...models.sessions import Sessions
from ...settings import Settings
from ...supervision.supervisor import Supervisor
from ...wire import OfModel, requests, responses
from ..bodies import BodyRoute
from ..dependencies import (
    BaseUrl,
    CallerOf,
    Limit,
    Offset,
    Owner,
    Provided,
    RequestedDialect,
    described_as,
    xorl_name,
)
from ..openapi import BINARY

run_router = APIRouter(prefix="/api/v1", tags=["training runs"])


AccessScope = Literal["owned", "accessible"]
"""`accessible`: also others' runs of which a checkpoint is published, and of these no more than that."""


async def _training_run(ledger: Ledger, owner: str, row: Row, requested: Dialect | None) -> dict[str, Any]:
    """Describe a run, with its newest checkpoints that the caller may see."""
    saved = await _checkpoints_of(ledger, owner, row)
    name = xorl_name(row, requested)
    last = {
        kind: next((shown(each, name) for each in saved if each.segment == kind), None)
        for kind in paths.SEGMENTS
    }
    return {
        "training_run_id": name or row.id,
        "model_id": row.alias or row.id,
        "base_model": row.base_model,
        "model_owner": row.owner,
        "is_lora": row.lora is not None,
        "lora_rank": None if row.lora is None else row.lora["rank"],
        "corrupted": row.state == "failed",
        "last_request_time": iso(row.last_request_at),
        "last_checkpoint": last["weights"],
        "last_sampler_checkpoint": last["sampler_weights"],
        "user_metadata": as_strings(row.user_metadata) if row.owner == owner else None,
    }


async def _checkpoints_of(ledger: Ledger, owner: str, run: Row) -> Sequence[Row]:
    others = run.owner != owner
    return await ledger.read(rows.of_run, run.id, published_only=others)


@run_router.get("/training_runs", responses=described_as(responses.TrainingRuns))
async def training_runs(
    ledger: Provided[Ledger],
    owner: Owner,
    requested: RequestedDialect,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: AccessScope = "owned",
    project_id: str | None = None,
) -> dict[str, Any]:
    """List training runs, newest first: the caller's own, or all that it may read (`accessible`)."""
    of = tenancy.models_of(owner)
    if access_scope == "accessible":
        of |= tenancy.models_among(rows.published_runs())
    if project_id is not None:
        # The names of projects are each tenant's own.
        of &= tenancy.models_of_project(project_id) & tenancy.models_of(owner)
    page, total = await ledger.read(tenancy.list_models, of, limit, offset)
    return {
        "training_runs": [await _training_run(ledger, owner, row, requested) for row in page],
        "cursor": {"offset": offset, "limit": limit, "total_count": total},
    }


async def _find_run(ledger: Ledger, owner: str, run_id: str, access_scope: AccessScope) -> Row:
    """Find a run of the caller's, or, if it is accessible, one with a published checkpoint. Raises
    NotFound."""
    row = await ledger.read(tenancy.find_owned, owner, run_id)
    if row is not None:
        return row
    row = await ledger.read(tenancy.find_model, run_id)
    if row is not None and access_scope == "accessible" and await _checkpoints_of(ledger, owner, row):
        return row
    raise NotFound(f"unknown training run {run_id!r}")


@run_router.get("/training_runs/{run_id}", responses=described_as(responses.TrainingRun))
async def training_run(
    run_id: str,
    ledger: Provided[Ledger],
    owner: Owner,
    requested: RequestedDialect,
    access_scope: AccessScope = "owned",
) -> dict[str, Any]:
    """Describe one training run."""
    return await _training_run(ledger, owner, await _find_run(ledger, owner, run_id, access_scope), requested)


@run_router.get("/training_runs/{run_id}/checkpoints", responses=described_as(responses.Checkpoints))
async def checkpoints_of_run(
    run_id: str, ledger: Provided[Ledger], owner: Owner, requested: RequestedDialect
) -> dict[str, Any]:
    """List the checkpoints of a run: all of the caller's own, or the published ones of another tenant's
    run."""
    run = await _find_run(ledger, owner, run_id, "accessible")
    name = xorl_name(run, requested)
    return {"checkpoints": [shown(row, name) for row in await _checkpoints_of(ledger, owner, run)]}


router = APIRouter(prefix="/api/v1", tags=["checkpoints"], route_class=BodyRoute)

LISTED = 1000  # of a model, at most


@router.get("/checkpoints", responses=described_as(responses.CheckpointPage))
async def list_checkpoints(
    ledger: Provided[Ledger],
    owner: Owner,
    requested: RequestedDialect,
    limit: Limit = 100,
    offset: Offset = 0,
) -> dict[str, Any]:
    """List the checkpoints of all the caller's training runs, newest first."""
    page, total = await ledger.read(rows.of_owner, owner, limit, offset)
    runs = await ledger.read(tenancy.models_by_id, {row.run_id for row in page})
    return {
        "checkpoints": [
            shown(row, xorl_name(runs[row.run_id], requested) if row.run_id in runs else None) for row in page
        ],
        "cursor": {"offset": offset, "limit": limit, "total_count": total},
    }


@router.post("/list_checkpoints", responses=described_as(responses.Checkpoints))
async def list_checkpoints_of_model(body: OfModel, ledger: Provided[Ledger], owner: Owner) -> dict[str, Any]:
    """List the checkpoints of all the caller's models with this id or name, newest first."""
    found = await ledger.read(rows.of_name, owner, body.model_id, LISTED)
    model = body.model_id  # as the client names it
    return {
        "checkpoints": [
            shown(row)
            | {
                "path": f"{paths.XORL_SCHEME}{model}/{row.segment}/{row.name}",
                "checkpoint_id": f"{row.segment}/{model}/{row.name}",
            }
            for row in found
        ]
    }


@router.post("/delete_checkpoint", responses=described_as(responses.DeletedCheckpoint))
async def delete_named_checkpoint(
    body: requests.DeleteCheckpoint, checkpoints: Provided[Checkpoints], owner: Owner
) -> dict[str, Any]:
    """Delete a checkpoint, given as xorl's clients name it."""
    uri = parse_short(body.checkpoint_id, body.model_id)
    await checkpoints.delete(owner, uri)
    path = f"{paths.XORL_SCHEME}{uri.run}/{uri.checkpoint_id}"
    return {"success": True, "deleted_path": path, "error": None}


@router.post("/weights_info", responses=described_as(responses.CheckpointInfo | responses.NoCheckpoint))
async def weights_info(
    body: requests.WeightsInfo, checkpoints: Provided[Checkpoints], owner: Owner
) -> dict[str, Any]:
    """Say whether a checkpoint exists, and how its model was created."""
    try:
        row = await checkpoints.find(owner, parse(body.path or body.tinker_path or ""))
    except NotFound:
        if body.path is None:
            raise
        return {"exists": False}
    lora = row.lora or {}
    info = {
        "exists": True,
        "base_model": row.base_model,
        "is_lora": row.lora is not None,
        "lora_rank": 0,  # as xorl-client asks for full weights when it goes on from a checkpoint
        "optimizer_config": row.optimizer,
        "created_at": iso(row.created_at),
        "size_bytes": row.size_bytes,
    }
    if row.lora is not None:
        info |= {"lora_rank": lora["rank"], "lora_alpha": lora["alpha"]}
        info |= {key: lora[key] for key in ("train_unembed", "train_mlp", "train_attn")}
        info["lora_config"] = lora | {"lora_rank": lora["rank"], "lora_alpha": lora["alpha"]}
    return info


@router.post("/copy_weights", responses=described_as(responses.CopiedWeights))
async def copy_weights(
    body: requests.CopyWeights,
    sessions: Provided[Sessions],
    checkpoints: Provided[Checkpoints],
    copies: Provided[Copies],
    owner: Owner,
    x_idempotency_key: Annotated[str | None, Header()] = None,
) -> dict[str, str]:
    """Copy a checkpoint of any kind: as a new run of a session, or, in a project, as a new session."""
    source = await checkpoints.find(owner, parse(body.source_path))
    session_id, number, project = body.session_id, body.model_seq_id, None
    if session_id is not None and number is not None:
        session_id = await sessions.require_active(owner, session_id)
    elif body.destination_project_id is not None:
        session_id, number = session_of(owner, x_idempotency_key), 0
        project = body.destination_project_id
    else:
        raise BadRequest("copy_weights: give destination_project_id, or session_id and model_seq_id")
    uri = await copies.copy(owner, source, session_id, number, project, body.ttl_seconds)
    return {"tinker_path": str(uri)}


_ONE = "/training_runs/{run_id}/checkpoints/{segment}/{name}"


async def _uri(run_id: str, segment: str, name: str) -> paths.CheckpointUri:
    return named(run_id, segment, name)


Uri = Annotated[paths.CheckpointUri, Depends(_uri)]
"""The checkpoint that a path names."""


@router.delete(_ONE, responses=described_as(responses.Acknowledged))
async def delete_checkpoint(uri: Uri, checkpoints: Provided[Checkpoints], owner: Owner) -> dict[str, str]:
    """Delete a checkpoint."""
    await checkpoints.delete(owner, uri)
    return {"status": "deleted"}


@router.post(_ONE + "/publish", responses=described_as(responses.Acknowledged))
async def publish(uri: Uri, checkpoints: Provided[Checkpoints], owner: Owner) -> dict[str, str]:
    """Let every tenant read and copy the checkpoint."""
    await checkpoints.publish(owner, uri, True)
    return {"status": "published"}


@router.delete(_ONE + "/publish", responses=described_as(responses.Acknowledged))
async def unpublish(uri: Uri, checkpoints: Provided[Checkpoints], owner: Owner) -> dict[str, str]:
    """Let only its owner read the checkpoint again. Copies remain."""
    await checkpoints.publish(owner, uri, False)
    return {"status": "unpublished"}


@router.put(_ONE + "/ttl", responses=described_as(responses.Acknowledged))
async def set_ttl(
    uri: Uri, body: requests.Ttl, checkpoints: Provided[Checkpoints], owner: Owner
) -> dict[str, str]:
    """Set when the checkpoint expires, counted from now; null keeps it."""
    await checkpoints.set_ttl(owner, uri, body.ttl_seconds)
    return {"status": "changed"}


download_router = APIRouter(prefix="/api/v1", tags=["downloads"])


def _file_of(media_type: str) -> dict[int | str, Any]:
    return {200: {"content": {media_type: {"schema": BINARY}}}}


async def _find_saved(
    checkpoints: Checkpoints,
    caller: Caller,
    uri: paths.CheckpointUri,
    save: str | None = None,
    with_files: bool = False,
) -> Row:
    """Find a checkpoint that the caller may read, and record the read in the audit log.

    `save`: the save that a signed URL was made for; its read was recorded when the URL was made.
    Raises NotFound if it was deleted, even if another has its name now, and BadRequest for a training state
    if safetensors are needed (`with_files`).
    """
    row = await checkpoints.find(caller.owner, uri)
    if save is not None and save != _save(row):
        raise NotFound(f"the checkpoint {str(uri)!r} that this URL was made for was deleted")
    if with_files and row.segment == "weights":
        raise BadRequest(
            f"{str(uri)!r} is a training state, of no use elsewhere; save_weights_for_sampler or "
            "save_weights_external write files that PEFT reads (tinker checkpoint download does it for you)"
        )
    if caller.key is not None:
        await checkpoints.record_read(caller.owner, row)
    return row


def _save(row: Row) -> str:
    """Return an id that no other checkpoint has, not even one that gets the same name later."""
    return row.directory.rpartition("-")[2]


@download_router.get(_ONE + "/archive", status_code=302, response_class=Response)
async def archive_url(
    uri: Uri, base: BaseUrl, signer: Provided[UrlSigner], checkpoints: Provided[Checkpoints], caller: CallerOf
) -> Response:
    """Redirect to a signed URL of a checkpoint's archive."""
    row = await _find_saved(checkpoints, caller, uri)
    expires = signer.expiry()
    path = f"/api/v1/training_runs/{uri.run}/checkpoints/{uri.checkpoint_id}/archive.tar"
    location = base + signer.sign(path, caller.owner, _save(row), expires)
    date = format_datetime(datetime.fromtimestamp(expires, UTC), usegmt=True)
    return Response(status_code=302, headers={"Location": location, "Expires": date})


@download_router.get(_ONE + "/archive.tar", response_class=Response, responses=_file_of("application/x-tar"))
async def archive(
    uri: Uri,
    settings: Provided[Settings],
    disk: Provided[Disk],
    engine: Provided[Supervisor],
    checkpoints: Provided[Checkpoints],
    caller: CallerOf,
    save: str | None = None,
) -> Response:
    """Send a checkpoint as a tar of files that PEFT (or, for full weights, transformers) can read.

    A training state is exported first: the SDK up to 0.33 downloads `weights/...` in `tinker checkpoint
    download`.
    """
    row = await _find_saved(checkpoints, caller, uri, save)
    try:
        if row.segment == "weights":
            tar = await _archive_of_state(settings, disk, engine, row)
        else:
            directory = paths.resolve(settings.data_dir, row.directory)
            tar = await asyncio.to_thread(Archive, directory, checkpoints.base_folder(row))
    except FileNotFoundError:
        raise NotFound(f"the files of {uri.name!r} were deleted") from None
    headers = {
        "Content-Length": str(tar.length),
        "Content-Disposition": f'attachment; filename="{row.name}.tar"',
    }
    return StreamingResponse(tar.chunks(), media_type="application/x-tar", headers=headers)


async def _archive_of_state(settings: Settings, disk: Disk, engine: Supervisor, row: Row) -> Archive:
    """Export the weights of a training state. The archive keeps its files open, so their folder is deleted at
    once.

    Raises BadRequest, or Unavailable.
    """
    disk.require_room()
    identifier = uuid.uuid4().hex
    # Below the checkpoints, where the sweep finds what a crash leaves.
    key = f"checkpoints/{row.run_id.replace(':', '@')}/archived/{identifier}"
    directory = paths.resolve(settings.data_dir, key)
    request = messages.ExportWeights(
        f"archive-{identifier}", row.base_model, row.directory, key, merged=False
    )
    try:
        answer = await engine.request(request)
        if isinstance(answer, messages.Failed):
            kind = BadRequest if answer.category == "user" else Unavailable
            raise kind(f"the checkpoint cannot be exported: {answer.message}")
        return await asyncio.to_thread(Archive, directory)
    finally:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


@download_router.get(_ONE + "/external_weights_urls", responses=described_as(responses.FileUrls))
async def external_weights_urls(
    uri: Uri,
    base: BaseUrl,
    settings: Provided[Settings],
    signer: Provided[UrlSigner],
    checkpoints: Provided[Checkpoints],
    caller: CallerOf,
) -> dict[str, Any]:
    """Return a signed URL of each file of a checkpoint."""
    row = await _find_saved(checkpoints, caller, uri, with_files=True)
    expires = signer.expiry()
    below = f"/api/v1/training_runs/{uri.run}/checkpoints/{uri.checkpoint_id}/files"
    directory = paths.resolve(settings.data_dir, row.directory)
    names = await asyncio.to_thread(files, directory, checkpoints.base_folder(row))
    urls = {file: base + signer.sign(f"{below}/{file}", caller.owner, _save(row), expires) for file in names}
    return {"urls": urls, "expires": iso(expires)}


@download_router.get(
    _ONE + "/files/{file:path}", response_class=Response, responses=_file_of("application/octet-stream")
)
async def file(
    uri: Uri,
    file: str,
    settings: Provided[Settings],
    checkpoints: Provided[Checkpoints],
    caller: CallerOf,
    save: str | None = None,
) -> Response:
    """Send one file of a checkpoint."""
    row = await _find_saved(checkpoints, caller, uri, save, with_files=True)
    directory = paths.resolve(settings.data_dir, row.directory)
    found = (await asyncio.to_thread(files, directory, checkpoints.base_folder(row))).get(file)
    if found is None:
        raise NotFound(f"the checkpoint {uri.name!r} has no file {file[:200]!r}")
    if isinstance(found, bytes):
        return Response(found, media_type="application/octet-stream")
    return FileResponse(found, media_type="application/octet-stream", filename=found.name)
