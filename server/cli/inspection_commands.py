"""`tinsmith status`, `top`, `runs`, `logs` and `doctor`: the state of a server, and checks before a start."""

from __future__ import annotations

import contextlib
import heapq
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from ...ckpt.tokenizer_files import has_tokenizer
from ...engine.logs import FILES, FOLDER
from ..settings import LedgerSettings, Settings
from .checkpoints_command import OPTION, RemoteServer
from .command_line import fail, read_settings, require_writable, takes_settings

# --- status, top and runs

Url = Annotated[str | None, OPTION]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_MOST_RUNS = 1000

STATUS_HELP = """Show the state of a server: engine, queue, memory, disk, and the newest runs.

Example: `tinsmith status --url http://gpu-1:8000`

The server's key is read from TINKER_API_KEY. The exit status is 1 if the engine cannot start.
"""
TOP_HELP = """Show what `tinsmith status` shows, and update it until Ctrl-C."""
RUNS_HELP = """List runs, newest first. With an id, show that run and its checkpoints.

Examples:

- `tinsmith runs`

- `tinsmith runs 2db7c8e8282f4e7f922d66f39416b2ff:train:0`
"""


def status(url: Url = None, as_json: AsJson = False) -> None:
    server = RemoteServer(url)
    health = _health(server)
    if as_json:
        typer.echo(json.dumps(health))
    else:
        _console().print(_overview(server, health, _runs(server, 5)))
    if health["status"] != "healthy":
        raise typer.Exit(1)


def top(
    url: Url = None, every: Annotated[float, typer.Option(min=0.2, help="Seconds between two updates.")] = 2.0
) -> None:
    server = RemoteServer(url)
    console = _console()
    if not console.is_terminal:  # nothing can be redrawn in a file or pipe
        while True:
            console.print(_overview(server, _health(server), _runs(server, 20)))
            time.sleep(every)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(_overview(server, _health(server), _runs(server, 20)), refresh=True)
            time.sleep(every)


def runs(
    run: Annotated[str | None, typer.Argument(help="The id of a run in the list.")] = None,
    url: Url = None,
    limit: Annotated[int, typer.Option(min=1, max=_MOST_RUNS, help="The most runs to list.")] = 20,
    as_json: AsJson = False,
) -> None:
    server = RemoteServer(url)
    if run is None:
        found = _runs(server, limit)
        typer.echo(json.dumps(found)) if as_json else _console().print(_table_of_runs(found))
        return
    described = server.ask("GET", f"training_runs/{run}", f"{run} was not found")
    checkpoints = server.ask("GET", f"training_runs/{run}/checkpoints", f"{run} has no checkpoints")
    if as_json:
        typer.echo(json.dumps({"training_run": described} | checkpoints))
    else:
        tables = _table_of_runs([described]), _table_of_checkpoints(checkpoints["checkpoints"])
        _console().print(Group(*tables))


def _console() -> Console:
    """Return a console that shows names unchanged: without emojis such as `:train:`, and without markup."""
    return Console(emoji=False, markup=False, highlight=False)


def _health(server: RemoteServer) -> dict[str, Any]:
    return server.ask("GET", "health", "the server's health cannot be read", accepted=(200, 503))


def _runs(server: RemoteServer, limit: int) -> list[dict[str, Any]]:
    answer = server.ask("GET", "training_runs", "runs cannot be listed", params={"limit": limit})
    return answer["training_runs"]


def _overview(server: RemoteServer, health: dict[str, Any], runs: list[dict[str, Any]]) -> RenderableType:
    engine, disk = health["engine"], health["disk"]
    facts = Table.grid(padding=(0, 2))
    state = Text(
        engine["phase"], "green" if engine["ready"] else "yellow" if health["engine_running"] else "red"
    )
    facts.add_row("server", f"Tinsmith {health['version']} on {server.url}")
    restarts = f"  (started {engine['lives']} times)" if engine["lives"] > 1 else ""
    facts.add_row("engine", Text.assemble(state, f"  {engine['text']}", restarts))
    waiting = health["active_requests"]
    facts.add_row("operations", f"{waiting} waiting, {health['total_requests']} since the start")
    facts.add_row(
        "models", f"{health['active_models']} in the engine, of {health['active_sessions']} sessions"
    )
    if (memory := health["memory"]) is not None:
        held = _by_kind(memory["held_bytes"]) or "nothing held"
        facts.add_row("memory", f"{_size(memory['capacity_bytes'])} for each device; {held}")
    if "error" not in disk:
        used = _by_kind(disk["used_bytes"])
        full = "  FULL: submits are refused" if disk["full"] else ""
        facts.add_row("disk", f"{_size(disk['free_bytes'])} free; {used or 'nothing stored'}{full}")
    return Group(facts, _table_of_runs(runs)) if runs else facts


def _table_of_runs(runs: list[dict[str, Any]]) -> Table:
    table = Table(
        Column("run", overflow="fold", min_width=32),
        "base model",
        "weights",
        "last request",
        "last checkpoint",
        box=None,
    )
    for run in runs:
        last = run.get("last_checkpoint") or run.get("last_sampler_checkpoint")
        weights = f"LoRA {run['lora_rank']}" if run.get("is_lora") else "full"
        table.add_row(
            run["training_run_id"],
            run["base_model"],
            weights,
            _ago(run["last_request_time"]),
            last["checkpoint_id"] if last else "",
        )
    return table


def _table_of_checkpoints(checkpoints: list[dict[str, Any]]) -> Table:
    table = Table(Column("checkpoint", overflow="fold", min_width=40), "size", "made", "expires", box=None)
    for each in checkpoints:
        expires = each.get("expires_at") or ""
        table.add_row(each["path"], _size(each.get("size_bytes") or 0), _ago(each["time"]), expires)
    return table


def _by_kind(sizes: dict[str, int]) -> str:
    return ", ".join(f"{kind.replace('_', ' ')} {_size(size)}" for kind, size in sizes.items() if size)


def _size(size: float) -> str:
    """Format bytes in decimal units: `31.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _ago(when: str) -> str:
    seconds = (datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


# --- logs: what the server and the engine have logged, in order of time

LOGS_HELP = """Print the logs of a server and its engine, merged by time. The server need not be running.

Examples, in the folder where the server was started (or with the same `--data-dir`):

- `tinsmith logs` prints the last 100 lines

- `tinsmith logs -f` keeps printing new lines until Ctrl-C

- `tinsmith logs --of engine -n 1000` prints only the engine's lines
"""

# A line begins with a time: local in text, UTC in JSON. Other lines belong to the one before them.
_BEGIN = re.compile(r'(?:\{"time": ")?(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d\.\d{3})')
_LOOK_SECONDS = 0.25
Line = tuple[str, str]  # its time, and its text with the lines that belong to it


def logs(
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=1, help="How many lines to print, counted from the end.")
    ] = 100,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Keep printing new lines until Ctrl-C.")
    ] = False,
    of: Annotated[
        Literal["server", "engine"] | None,
        typer.Option(help="Print only this process's lines: server or engine."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="The server's data directory [default: ./tinsmith-data].")
    ] = None,
) -> None:
    """Print the end of the log files."""
    settings = read_settings(LedgerSettings, {} if data_dir is None else {"data_dir": data_dir})
    folder = settings.data_dir / FOLDER
    files = [folder / f"{process}.log" for process in ((of,) if of else ("server", "engine"))]
    if not any(file.exists() for file in files):
        fail(f"there is no log in {folder}; give the server's data directory with --data-dir")
    ends = {file: file.stat().st_size if file.exists() else 0 for file in files}
    merged = list(heapq.merge(*(list(_all(file)) for file in files)))
    for _, text in merged[-lines:]:
        typer.echo(text)
    while follow:
        time.sleep(_LOOK_SECONDS)
        new = chain.from_iterable(_new(file, ends) for file in files)
        for _, text in sorted(new):
            typer.echo(text)


def _all(file: Path) -> Iterator[Line]:
    """Yield a process's lines, oldest file first."""
    older = [file.with_name(f"{file.name}.{number}") for number in range(FILES - 1, 0, -1)]
    for each in (*older, file):
        if each.exists():
            yield from _lines(each.read_text("utf-8", "replace"))


def _new(file: Path, ends: dict[Path, int]) -> list[Line]:
    """Return the lines since the last look. A file that is shorter than before was started again."""
    if not file.exists():
        return []
    size = file.stat().st_size
    begin = ends[file] if size >= ends[file] else 0
    with file.open("rb") as opened:
        opened.seek(begin)
        data = opened.read()
    whole = data[: data.rfind(b"\n") + 1]
    ends[file] = begin + len(whole)
    return list(_lines(whole.decode("utf-8", "replace")))


def _lines(text: str) -> Iterator[Line]:
    begun: list[str] = []
    when = ""
    for line in text.splitlines():
        found = _BEGIN.match(line)
        if found and begun:
            yield when, os.linesep.join(begun)
            begun = []
        if found:
            when = found[1].replace("T", " ")
        begun.append(line)
    if begun:
        yield when, os.linesep.join(begun)


# --- doctor: whether `tinsmith serve` would work with these settings, and what to do if not

DOCTOR_HELP = """Check what `tinsmith serve` needs, and say what to do if something is wrong.

It checks Python and the packages, the devices, the data directory and its ledger, the disk, the port, the
models and the SGLang servers. It takes the options of `serve`, and neither starts nor changes anything.

Example: `tinsmith doctor --model Qwen/Qwen3-8B --mesh fsdp=2`

The exit status is 1 if something is wrong.
"""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "fastapi", "uvicorn")
_FREE_BYTES = 10 << 30  # checkpoints soon fill a disk with less
_DEVICES = """
import json, jax
found = jax.devices()
stats = found[0].memory_stats() or {}
one = found[0]
print(json.dumps([jax.__version__, one.platform, one.device_kind, len(found), stats.get("bytes_limit")]))
"""
_DEVICE_SECONDS, _ENDPOINT_SECONDS = 120.0, 5.0


@dataclass(frozen=True)
class Finding:
    """The result of one check. `advice` says what to do about a warning or a problem."""

    what: str
    state: Literal["ok", "warning", "problem"]
    text: str
    advice: str = ""


_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red")}


@takes_settings(Settings, json=(AsJson, False))
def doctor(config: Path | None = None, json: bool = False, **given: Any) -> None:
    settings = read_settings(Settings, given, config)
    found = []
    for check in _CHECKS:
        for finding in check(settings):
            found.append(finding)
            if not json:
                mark, color = _MARKS[finding.state]
                typer.echo(f"{typer.style(mark, fg=color)} {finding.what}: {finding.text}")
                if finding.advice:
                    typer.echo(f"    {finding.advice}")
    if json:
        typer.echo(_json(found))
    if any(each.state == "problem" for each in found):
        raise typer.Exit(1)


def _json(found: list[Finding]) -> str:
    return json.dumps([asdict(each) for each in found])


def _software(_settings: Settings) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok", f"{version} at {sys.executable}")
    there, missing = [], []
    for name in _PACKAGES:
        try:
            there.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield Finding("packages", "ok", ", ".join(there))
    if missing:
        yield Finding(
            "packages", "problem", f"missing: {', '.join(missing)}", "install Tinsmith again, with pip"
        )


def _devices(settings: Settings) -> Iterator[Finding]:
    """Check the devices, in a process that asks JAX as the engine would."""
    command = [sys.executable, "-c", _DEVICES]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_DEVICE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        text = f"JAX does not find its devices within {_DEVICE_SECONDS:.0f} s"
        yield Finding("devices", "problem", text, "another process may hold them; on a TPU VM only one can")
        return
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding(
            "devices",
            "problem",
            last,
            "does jaxlib fit the driver? The extras cuda12 and cuda13 install one that does (README.md)",
        )
        return
    version, platform, kind, count, limit = json.loads(ended.stdout.splitlines()[-1])
    memory = f", {limit / 1e9:.1f} GB each" if limit else ""
    yield Finding("devices", "ok", f"JAX {version} finds {count} x {kind} ({platform}){memory}")
    if platform == "cpu" and (shutil.which("nvidia-smi") or Path("/dev/accel0").exists()):
        yield Finding(
            "devices",
            "warning",
            "this machine has an accelerator, and JAX uses the CPU",
            "install Tinsmith with the extra cuda12, cuda13 or tpu (README.md, Requirements)",
        )
    wanted = 1
    for size in settings.mesh.values():
        wanted *= size
    if wanted > count:
        text = f"--mesh is of {wanted} devices, and there are {count}"
        yield Finding("devices", "problem", text, f"choose a mesh of {count} or fewer devices")
    elif wanted < count:
        text = f"the server would use {wanted} of {count} devices"
        yield Finding("devices", "warning", text, f"to use all of them, add --mesh fsdp={count}")


def _data(settings: Settings) -> Iterator[Finding]:
    from ..ledger.ledger import check
    from ..ledger.ownership import claim, sqlite_file

    advice = "choose another folder, or give this user the right to write there"
    for folder, option in ((settings.data_dir, "--data-dir"), (settings.cache_dir, "--cache-dir")):
        try:
            require_writable(folder, option)
        except ValueError as error:
            yield Finding("folders", "problem", str(error), advice)
        else:
            yield Finding("folders", "ok", f"{folder.expanduser().absolute()} can be written to")
    try:
        check(settings.ledger_url)
    except (ValueError, OSError) as error:
        advice = "choose another --data-dir, or restore a backup"
        if settings.database_url is not None:
            advice = "start the database, or correct TINSMITH_DATABASE_URL"
        yield Finding("ledger", "problem", str(error), advice)
        return
    if (file := sqlite_file(settings.ledger_url)) is not None and not file.is_file():
        yield Finding("ledger", "ok", f"{file} will be created")
        return
    try:
        owner = claim(settings.data_dir, settings.ledger_url) if settings.data_dir.is_dir() else None
    except (ValueError, OSError) as error:
        yield Finding("ledger", "problem", str(error), "stop that server, or choose another --data-dir")
        return
    if owner is not None:
        owner.release()
    yield Finding("ledger", "ok", "it can be read, and no server owns it")


def _disk(settings: Settings) -> Iterator[Finding]:
    folder = settings.data_dir.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free at {folder}"
    if free < settings.disk_reserve_bytes:
        yield Finding("disk", "problem", text, "submits would be refused with 507: make room")
    elif free < _FREE_BYTES:
        yield Finding("disk", "warning", text, "checkpoints may soon fill it")
    else:
        yield Finding("disk", "ok", text)


def _port(settings: Settings) -> Iterator[Finding]:
    from .serve import listen

    try:
        listen(settings.host, settings.port).close()
    except ValueError as error:
        text, _, advice = str(error).partition("; ")
        if "is in use" in text:
            pid, command = _listener(settings.port)
            text += f" by {command}" + (f" (process {pid})" if pid else "")
            stop = f"stop it (kill {pid})" if pid else "stop it"
            advice = f"{stop}, or choose another port with --port (or TINSMITH_PORT)"
        otherwise = "give --host an address of this machine: 127.0.0.1, or 0.0.0.0 for all of them"
        yield Finding("port", "problem", text, advice or otherwise)
    else:
        text = f"{settings.host}, port {settings.port}, is free" if settings.port else "a free one is chosen"
        yield Finding("port", "ok", text)


def _listener(port: int) -> tuple[int | None, str]:
    """Return the process that listens on a port, and its command, as far as this user may see it."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                local, _remote, state, *others = row.split()[1:]
                if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{others[5]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(each) in sockets for each in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                return int(process.name), command.strip()[:200]
    return None, "another user's program"


def _models(settings: Settings) -> Iterator[Finding]:
    from ..base_models import plan

    if not settings.model:
        yield Finding("model", "warning", "none was given", "give one, such as --model smollm2-135m")
    for entry in settings.model:
        try:
            planned = plan(
                [entry], settings.dtype, settings.mesh, settings.max_sequence_length, settings.kv_cache_tokens
            )
        except (ValueError, OSError, RuntimeError) as error:
            yield Finding("model", "problem", str(error), _about_model(entry, str(error)))
            continue
        for each in planned:
            where = each.folder or each.hub_id or "the package index"
            size = f", {each.parameters / 1e6:,.1f} million parameters" if each.parameters else ""
            yield Finding("model", "ok", f"{each.name}: {where}{size}")
            if each.folder is not None and not has_tokenizer(each.folder):
                advice = (
                    "copy them from the model's page; without them, clients have to send and read token ids"
                )
                yield Finding("model", "warning", f"{each.name} has no tokenizer files", advice)


def _about_model(entry: str, problem: str) -> str:
    """Say what to do about a model that cannot be served: what its folder lacks, or where to look."""
    if "too large" in problem:
        return f"tinsmith plan --model {entry} shows what takes how much, and what would fit"
    sources = (Path(each).expanduser() for each in (entry, entry.partition("=")[2]) if each)
    folder = next((each for each in sources if each.is_dir()), None)
    if folder is None:
        return (
            "give an existing folder, or OWNER/NAME on the Hugging Face hub (with HF_TOKEN if it is gated); "
            "if the hub cannot be reached from here, download the model elsewhere and give its folder"
        )
    missing = [name for name in ("config.json", "*.safetensors") if not any(folder.glob(name))]
    missing += [] if has_tokenizer(folder) else ["tokenizer.json"]
    if missing:
        return f"{folder} lacks {', '.join(missing)}: give the folder that has all files of the model"
    return "docs/models.md says which models are read; download the files again if they are damaged"


def _sglang(settings: Settings) -> Iterator[Finding]:
    import httpx

    secret = settings.sglang_api_key
    headers = {} if secret is None else {"Authorization": f"Bearer {secret.get_secret_value()}"}
    for url in settings.sglang_urls:
        try:
            answer = httpx.get(f"{url}/get_model_info", headers=headers, timeout=_ENDPOINT_SECONDS)
            answer.raise_for_status()
            served = answer.json().get("model_path", "a model")
        except (httpx.HTTPError, ValueError, AttributeError) as error:
            advice = "is it started, and is the address right? Until it answers, the engine draws the samples"
            yield Finding("sglang", "warning", f"{url}: {error}", advice)
        else:
            yield Finding("sglang", "ok", f"{url} serves {served}")


_CHECKS: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
    _software,
    _devices,
    _data,
    _disk,
    _port,
    _models,
    _sglang,
)
