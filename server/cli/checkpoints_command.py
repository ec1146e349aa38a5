"""`tinsmith checkpoints`: imports, exports and merges of checkpoints on a running server."""

from __future__ import annotations

import enum
import os
import re
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from ..checkpoints.archive import CONFIG_FILE, TENSORS_FILE
from ..settings import ServingSettings
from .command_line import address, fail, progress_of_downloads, read_settings, waiting

_CONNECT_SECONDS = 10.0
OPTION = typer.Option(
    help="The server [default: TINSMITH_URL, TINKER_BASE_URL, or this machine's at TINSMITH_PORT, 8000]."
)


class RemoteServer:
    """A running server, for commands that are its clients.

    The key is TINKER_API_KEY's. Errors end the command with the server's reason.
    """

    def __init__(self, url: str | None):
        import httpx

        settings = read_settings(ServingSettings, {})
        named = url or os.environ.get("TINSMITH_URL") or os.environ.get("TINKER_BASE_URL")
        self.url = (named or address(settings.host, settings.port)).rstrip("/")
        if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", self.url):
            fail(f"{self.url!r} is not the address of a server; write http://HOST:PORT")
        key = os.environ.get("TINKER_API_KEY")
        headers = {} if key is None else {"X-API-Key": key}
        patience = httpx.Timeout(None, connect=_CONNECT_SECONDS)
        self._http = httpx.Client(base_url=f"{self.url}/api/v1/", headers=headers, timeout=patience)

    def ask(
        self,
        method: str,
        path: str,
        failed: str,
        /,
        accepted: tuple[int, ...] = (200,),
        waits: Callable[[str], object] = lambda reason: None,
        **request: Any,
    ) -> dict[str, Any]:
        """Send a request and return its JSON answer. `waits` gets the reasons why there is none yet.

        If its status is not `accepted`, the command ends with an error that begins with `failed`.
        """
        import httpx

        try:
            answer = self._http.request(method, path, **request)
            while answer.status_code == 408 and path == "retrieve_future":
                waits(answer.json().get("queue_state_reason"))
                answer = self._http.request(method, path, **request)
        except httpx.HTTPError as error:
            fail(
                f"{self.url} cannot be reached: {error}. Is the server running, and is its address right? "
                "--url or TINKER_BASE_URL names another one"
            )
        try:
            body = answer.json()
        except ValueError:
            body = {"error": answer.text[:500]}
        if answer.status_code not in accepted or "error" in body:
            reason = body.get("error") if isinstance(body, dict) else body
            fail(f"{failed} ({answer.status_code}): {reason}")
        return body

    def run(self, path: str, failed: str, doing: str, /, **body: Any) -> dict[str, Any]:
        """Start an operation and return its result. Meanwhile, show what is being done, and for how long."""
        submitted = self.ask("POST", path, failed, json=body)
        request = {"request_id": submitted["request_id"]}
        with waiting(doing) as reason:
            return self.ask("POST", "retrieve_future", failed, waits=reason, json=request)

    def download(self, url: str, file: Path) -> None:
        """Download a signed URL, without the key, and show the progress."""
        import httpx

        progress = progress_of_downloads(partial(typer.echo, err=True))
        try:
            with httpx.stream("GET", url, timeout=None) as answer, file.open("wb") as written:
                answer.raise_for_status()
                size = answer.headers.get("content-length")
                with progress.download(file.name, None if size is None else int(size)) as received:
                    for chunk in answer.iter_bytes():
                        received(written.tell() + written.write(chunk))
        except httpx.HTTPError as error:
            fail(f"{file.name} was not downloaded: {error}")


checkpoints = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Import, export and merge checkpoints on a running server.",
)

_IMPORT_HELP = """Import an adapter that PEFT has saved as a checkpoint, to sample from and to train further.

Examples:

- A server on this machine: `tinsmith checkpoints import ./my-adapter --model qwen3-0.6b`

- Another server: `export TINKER_BASE_URL=https://train.example.org TINKER_API_KEY=tml-...`, then
  `tinsmith checkpoints import adapter.tar --model qwen3-0.6b --name from-peft`

Prints two paths: the first is for create_training_client_from_state, the second for create_sampling_client.
"""


@checkpoints.command("import", help=_IMPORT_HELP)
def import_adapter(
    source: Annotated[
        Path, typer.Argument(help="A folder that PEFT saved, or an uncompressed tar of it.", exists=True)
    ],
    model: Annotated[str, typer.Option(help="The base model's name on the server.")],
    name: Annotated[str, typer.Option(help="The name of the new checkpoints.")] = "imported",
    project: Annotated[str | None, typer.Option(help="The project of the new checkpoints.")] = None,
    url: Annotated[str | None, OPTION] = None,
) -> None:
    query = {"base_model": model, "name": name} | ({} if project is None else {"project_id": project})
    with _tar(source) as tar:
        headers = {"Content-Type": "application/x-tar", "Content-Length": str(tar.seek(0, os.SEEK_END))}
        tar.seek(0)
        imported = RemoteServer(url).ask(
            "POST", "import_weights", f"{source} was not imported", params=query, headers=headers, content=tar
        )
    typer.echo(imported["path"])
    typer.echo(imported["sampler_path"])


_MERGE_HELP = """Download a whole model: a training state's adapter merged into its base model.

If the base model's embeddings are tied and the adapter changes the unembedding, the merged model is untied.

Example:

- `tinsmith checkpoints merge tinker://RUN/weights/final ./merged`
"""


@checkpoints.command("merge", help=_MERGE_HELP)
def merge(
    path: Annotated[str, typer.Argument(help="A training state, tinker://RUN/weights/NAME.")],
    folder: Annotated[Path, typer.Argument(help="A new or empty folder for the files.")],
    url: Annotated[str | None, OPTION] = None,
) -> None:
    _download(path, folder, url, "merged", merged=True)


class Experts(enum.StrEnum):
    """The values of `--experts`."""

    SHARED = "shared"
    PER_EXPERT = "per-expert"
    TARGET_PARAMETERS = "target-parameters"


_EXPORT_HELP = """Download a training state's adapter, in PEFT's format.

Programs read the adapters of mixtures, of delta nets and of vision-language models in different forms;
`--experts` chooses one. For other models, the forms are the same.

| form | read by |
|---|---|
| `shared` | tinker-cookbook, SGLang: one 3-D tensor for each factor, as in the hosted service's files |
| `per-expert` | vLLM, and PEFT for Qwen3-MoE: tensors for every expert |
| `target-parameters` | PEFT, for all models: stacked experts (`target_parameters` in its config) |

Example:

- `tinsmith checkpoints export tinker://RUN/weights/final ./adapter --experts target-parameters`
"""


@checkpoints.command("export", help=_EXPORT_HELP)
def export(
    path: Annotated[str, typer.Argument(help="A training state, tinker://RUN/weights/NAME.")],
    folder: Annotated[Path, typer.Argument(help="A new or empty folder for the files.")],
    experts: Annotated[
        Experts, typer.Option(help="The form of experts' adapters: see above.")
    ] = Experts.SHARED,
    url: Annotated[str | None, OPTION] = None,
) -> None:
    _download(path, folder, url, "exported", experts=experts.replace("-", "_"))


def _download(path: str, folder: Path, url: str | None, done: str, **form: Any) -> None:
    """Have the server export a training state, and download the files.

    `form`: further fields of the `save_weights_external` request.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"{folder} is not empty")
    server, failed = RemoteServer(url), f"{path} was not {done}"
    session = server.ask("POST", "create_session", failed, json={"tags": [done]})["session_id"]
    try:
        doing = f"loading {path} on {server.url}"
        made = {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": False}
        model = server.run("load_weights", failed, doing, **made)["model_id"]
        fields = {"model_id": model, "seq_id": 1, "path": done, "ttl_seconds": 24 * 3600}
        server.run("save_weights_external", failed, f"writing the {done} files there", **fields | form)
        checkpoint = f"training_runs/{model}/checkpoints/external_weights/{done}"
        urls = server.ask("GET", f"{checkpoint}/external_weights_urls", failed)["urls"]
        folder.mkdir(parents=True, exist_ok=True)
        for name in sorted(urls):
            server.download(urls[name], folder / Path(name).name)
            typer.echo(folder / Path(name).name)
        server.ask("DELETE", checkpoint, f"{checkpoint} was not deleted")
    finally:
        reason = {"reason": {"type": "success"}}
        server.ask("POST", f"sessions/{session}/finish", f"{session} was not finished", json=reason)


def _tar(source: Path) -> BinaryIO:
    """Open an adapter's archive; a folder is packed into one first."""
    if source.is_file():
        return source.open("rb")
    missing = [name for name in (CONFIG_FILE, TENSORS_FILE) if not (source / name).is_file()]
    if missing:
        fail(f"{source} has no {' and no '.join(missing)}; give a folder that save_pretrained wrote")
    file = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in (CONFIG_FILE, TENSORS_FILE):
            tar.add((source / name).resolve(), name)
    return file
