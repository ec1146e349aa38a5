"""`tinsmith status`, `top` and `runs`: a running server, seen from the terminal."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from .checkpoints_command import OPTION, RemoteServer

Url = Annotated[str | None, OPTION]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
_MOST_RUNS = 1000

STATUS_HELP = """Show how a server is: its engine, what waits, its disk and the newest training runs.

Example: `tinsmith status --url http://gpu-1:8000`. The key is TINKER_API_KEY's. The exit status is 1 if the
engine cannot start.
"""
TOP_HELP = """As `tinsmith status`, again and again until Ctrl-C."""
RUNS_HELP = """List training runs, the newest first; with an id, show that run and its checkpoints.

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
    url: Url = None,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
) -> None:
    server = RemoteServer(url)
    console = _console()
    if not console.is_terminal:  # nothing can be redrawn there
        while True:
            console.print(_overview(server, _health(server), _runs(server, 20)))
            time.sleep(every)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(_overview(server, _health(server), _runs(server, 20)), refresh=True)
            time.sleep(every)


def runs(
    run: Annotated[str | None, typer.Argument(help="A run's id, as the list shows it.")] = None,
    url: Url = None,
    limit: Annotated[int, typer.Option(min=1, max=_MOST_RUNS, help="How many at most.")] = 20,
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
    """Names are shown as they are: `:train:` is no emoji, and what clients call things is no markup."""
    return Console(emoji=False, markup=False, highlight=False)


def _health(server: RemoteServer) -> dict[str, Any]:
    return server.ask("GET", "health", "the server has no health", accepted=(200, 503))


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
    facts.add_row("engine", Text.assemble(state, f"  {engine['text']}", f"  (life {engine['lives']})"))
    waiting = health["active_requests"]
    facts.add_row("operations", f"{waiting} waiting, {health['total_requests']} since the start")
    facts.add_row(
        "models", f"{health['active_models']} in the engine, of {health['active_sessions']} sessions"
    )
    if "error" not in disk:
        used = ", ".join(f"{kind} {_size(bytes_)}" for kind, bytes_ in disk["used_bytes"].items() if bytes_)
        full = "  FULL: submits are refused" if disk["full"] else ""
        facts.add_row("disk", f"{_size(disk['free_bytes'])} free; {used or 'nothing stored'}{full}")
    memory = health.get("memory") or {}
    for kind, size in (memory.get("bytes") or {}).items() if isinstance(memory.get("bytes"), dict) else ():
        facts.add_row(f"memory: {kind}", _size(size))
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


def _size(size: float) -> str:
    """In decimal units: `31.2 MB`."""
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
