"""`tinsmith checkpoints`: what goes from files into a running server."""

from __future__ import annotations

import os
import tarfile
import tempfile
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from .adapter_archive import CONFIG_FILE, TENSORS_FILE

checkpoints = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Checkpoints of a server.")

_IMPORT_HELP = """Make a checkpoint of an adapter that PEFT has saved, to sample from and to train on.

Examples:

- `tinsmith checkpoints import ./my-adapter --model qwen3-0.6b`, where the server runs on this machine

- `export TINKER_BASE_URL=https://train.example.org TINKER_API_KEY=tml-...`, then
  `tinsmith checkpoints import adapter.tar --model qwen3-0.6b --name from-peft`

Prints two paths: the first is for create_training_client_from_state, the second for create_sampling_client.
"""


def _fail(message: str) -> typer.Exit:
    typer.echo(f"tinsmith: {message}", err=True)
    return typer.Exit(2)


@checkpoints.callback()
def _group() -> None:
    """With one command alone, typer would make it the group."""


@checkpoints.command("import", help=_IMPORT_HELP)
def import_adapter(
    source: Annotated[Path, typer.Argument(help="PEFT's folder, or an uncompressed tar of it.", exists=True)],
    model: Annotated[str, typer.Option(help="The base model, by its name on the server.")],
    name: Annotated[str, typer.Option(help="The checkpoints' name.")] = "imported",
    project: Annotated[str | None, typer.Option(help="The project that they go into.")] = None,
    url: Annotated[
        str | None, typer.Option(help="The server [default: TINKER_BASE_URL, or http://127.0.0.1:8000].")
    ] = None,
) -> None:
    import httpx

    url = (url or os.environ.get("TINKER_BASE_URL") or "http://127.0.0.1:8000").rstrip("/")
    key = os.environ.get("TINKER_API_KEY")
    query = {"base_model": model, "name": name} | ({} if project is None else {"project_id": project})
    headers = {"Content-Type": "application/x-tar"} | ({} if key is None else {"X-API-Key": key})
    with _tar(source) as tar:
        headers["Content-Length"] = str(tar.seek(0, os.SEEK_END))
        tar.seek(0)
        try:
            answer = httpx.post(
                f"{url}/api/v1/import_weights", params=query, headers=headers, content=tar, timeout=None
            )
        except httpx.HTTPError as error:
            raise _fail(f"{url} cannot be reached: {error}") from None
    if answer.status_code != 200:
        try:
            reason = answer.json()["error"]
        except (ValueError, KeyError, TypeError):
            reason = answer.text[:500]
        raise _fail(f"{source} was not imported ({answer.status_code}): {reason}")
    typer.echo(answer.json()["path"])
    typer.echo(answer.json()["sampler_path"])


def _tar(source: Path) -> BinaryIO:
    """The archive, or one with the folder's two files."""
    if source.is_file():
        return source.open("rb")
    missing = [name for name in (CONFIG_FILE, TENSORS_FILE) if not (source / name).is_file()]
    if missing:
        raise _fail(f"{source} has no {' and no '.join(missing)}; give a folder that save_pretrained wrote")
    file = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in (CONFIG_FILE, TENSORS_FILE):
            tar.add((source / name).resolve(), name)
    return file
