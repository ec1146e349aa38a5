"""Checkpoints as files: signed URLs of them, and what these lead to."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response, StreamingResponse
from sqlalchemy import Row

from ....ckpt import paths
from ....engine import messages
from ...access.tokens import UrlSigner
from ...checkpoints.archive import Archive, files
from ...checkpoints.checkpoints import Checkpoints, iso, named
from ...errors import BadRequest, NotFound, Unavailable
from ...files import Disk
from ...settings import Settings
from ...supervision.supervisor import Supervisor
from ...wire import responses
from ..dependencies import BaseUrl, CallerOf, Owner, described_as
from ..openapi import BINARY
from ..provided import Provided

router = APIRouter(prefix="/api/v1", tags=["downloads"])

_ONE = "/training_runs/{run_id}/checkpoints/{segment}/{name}"


def _file_of(media_type: str) -> dict[int | str, Any]:
    return {200: {"content": {media_type: {"schema": BINARY}}}}


async def _find_any(
    checkpoints: Checkpoints, owner: str, run_id: str, segment: str, name: str, save: str | None = None
) -> Row:
    """A checkpoint of any kind; with `save` that one of the name and no other."""
    uri = named(run_id, segment, name)
    row = await checkpoints.find(owner, uri)
    if save is not None and save != _save(row):
        raise NotFound(f"the checkpoint {str(uri)!r} that this URL was made for was deleted")
    return row


async def _find(
    settings: Settings,
    checkpoints: Checkpoints,
    owner: str,
    run_id: str,
    segment: str,
    name: str,
    save: str | None = None,
) -> tuple[Row, Path]:
    """A checkpoint of safetensors and its directory. Raises BadRequest for a training state."""
    row = await _find_any(checkpoints, owner, run_id, segment, name, save)
    if row.segment == "weights":
        raise BadRequest(
            f"{str(named(run_id, segment, name))!r} is a training state, of no use elsewhere; "
            "save_weights_for_sampler or save_weights_external write files that PEFT reads (tinker "
            "checkpoint download does it for you)"
        )
    return row, paths.resolve(settings.data_dir, row.directory)


def _save(row: Row) -> str:
    """What no other checkpoint has, also none that has the same name later."""
    return row.directory.rpartition("-")[2]


@router.get(_ONE + "/archive", status_code=302, response_class=Response)
async def archive_url(
    run_id: str,
    segment: str,
    name: str,
    base: BaseUrl,
    signer: Provided[UrlSigner],
    checkpoints: Provided[Checkpoints],
    owner: Owner,
) -> Response:
    """To a signed URL of the archive."""
    row = await _find_any(checkpoints, owner, run_id, segment, name)
    await checkpoints.record_read(owner, row)
    expires = signer.expiry()
    path = f"/api/v1/training_runs/{run_id}/checkpoints/{segment}/{name}/archive.tar"
    location = base + signer.sign(path, owner, _save(row), expires)
    date = format_datetime(datetime.fromtimestamp(expires, UTC), usegmt=True)
    return Response(status_code=302, headers={"Location": location, "Expires": date})


@router.get(_ONE + "/archive.tar", response_class=Response, responses=_file_of("application/x-tar"))
async def archive(
    run_id: str,
    segment: str,
    name: str,
    settings: Provided[Settings],
    disk: Provided[Disk],
    engine: Provided[Supervisor],
    checkpoints: Provided[Checkpoints],
    caller: CallerOf,
    save: str | None = None,
) -> Response:
    """The files that PEFT reads, or transformers those of full weights. A training state is exported for it:
    the SDK up to 0.33 asks so for `weights/...` in `tinker checkpoint download`."""
    row = await _find_any(checkpoints, caller.owner, run_id, segment, name, save)
    if caller.key is not None:
        await checkpoints.record_read(caller.owner, row)
    try:
        if row.segment == "weights":
            tar = await _archive_of_state(settings, disk, engine, row)
        else:
            tar = await asyncio.to_thread(Archive, paths.resolve(settings.data_dir, row.directory))
    except FileNotFoundError:
        raise NotFound(f"the files of {name!r} were deleted") from None
    headers = {
        "Content-Length": str(tar.length),
        "Content-Disposition": f'attachment; filename="{row.name}.tar"',
    }
    return StreamingResponse(tar.chunks(), media_type="application/x-tar", headers=headers)


async def _archive_of_state(settings: Settings, disk: Disk, engine: Supervisor, row: Row) -> Archive:
    """The weights of a training state. Its folder goes at once: the archive has the files open.

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


@router.get(_ONE + "/external_weights_urls", responses=described_as(responses.FileUrls))
async def external_weights_urls(
    run_id: str,
    segment: str,
    name: str,
    base: BaseUrl,
    settings: Provided[Settings],
    signer: Provided[UrlSigner],
    checkpoints: Provided[Checkpoints],
    owner: Owner,
) -> dict[str, Any]:
    """A signed URL of each file."""
    row, directory = await _find(settings, checkpoints, owner, run_id, segment, name)
    await checkpoints.record_read(owner, row)
    expires = signer.expiry()
    below = f"/api/v1/training_runs/{run_id}/checkpoints/{segment}/{name}/files"
    names = await asyncio.to_thread(files, directory)
    urls = {file: base + signer.sign(f"{below}/{file}", owner, _save(row), expires) for file in names}
    return {"urls": urls, "expires": iso(expires)}


@router.get(
    _ONE + "/files/{file:path}",
    response_class=Response,
    responses=_file_of("application/octet-stream"),
)
async def file(
    run_id: str,
    segment: str,
    name: str,
    file: str,
    settings: Provided[Settings],
    checkpoints: Provided[Checkpoints],
    caller: CallerOf,
    save: str | None = None,
) -> Response:
    row, directory = await _find(settings, checkpoints, caller.owner, run_id, segment, name, save)
    if caller.key is not None:
        await checkpoints.record_read(caller.owner, row)
    found = (await asyncio.to_thread(files, directory)).get(file)
    if found is None:
        raise NotFound(f"the checkpoint {name!r} has no file {file[:200]!r}")
    return FileResponse(found, media_type="application/octet-stream", filename=found.name)
