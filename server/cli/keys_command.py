"""`tinsmith keys`: API keys and quotas in the ledger."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from sqlalchemy import Connection

from .command_line import fail, read_settings, require_writable

T = TypeVar("T")

keys = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Create, list and revoke API keys, and limit what each tenant may use.

A key belongs to a tenant; a tenant may have several keys. Models, checkpoints and samplers belong to the
tenant whose key created them. Other tenants cannot see them.

Examples, in the folder where the server was started (or with the same `--data-dir`):

- `tinsmith keys create alice` prints a new key, this once; clients set it as TINKER_API_KEY

- `tinsmith keys list` lists the ids of all keys, never the keys themselves

- `tinsmith keys revoke 1f0c9a2b` revokes a key

- `tinsmith keys usage --days 7` shows what each tenant has used

- `tinsmith keys quota alice --models 4` limits a tenant

A running server notices changes within two seconds. Once there is a key, requests without one are refused;
what was created before that, without a key, belongs to the tenant `local`.
""",
)


def _size(text: str) -> int:
    from ..settings import read_size

    try:
        return read_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


DataDir = Annotated[Path | None, typer.Option(help="The server's data directory [default: ./tinsmith-data].")]


def _in_ledger(data_dir: Path | None, change: Callable[[Connection], T], make: bool = False) -> T:
    """Run a change or query in the ledger. `make`: create the ledger if it is missing."""
    from ..files import make_directory
    from ..ledger.ledger import Ledger, check
    from ..ledger.ownership import sqlite_file
    from ..settings import LedgerSettings

    settings = read_settings(LedgerSettings, {} if data_dir is None else {"data_dir": data_dir})

    async def write() -> T:
        ledger = Ledger(settings.ledger_url, settings.sync_every_commit)
        try:
            return await ledger.write(change)
        finally:
            ledger.close()

    try:
        file = sqlite_file(settings.ledger_url)
        if file is not None and not file.is_file():
            if not make:
                fail(f"there is no ledger {file}; give the server's data directory with --data-dir")
            require_writable(file.parent, "--data-dir")
            make_directory(file.parent)
            typer.echo(
                f"there was no ledger yet; this is the first key in {file}, for a server that is started "
                "with the same --data-dir",
                err=True,
            )
        check(settings.ledger_url)
        return asyncio.run(write())
    except (ValueError, OSError) as error:
        fail(str(error))


def _check_tenant(tenant: str) -> None:
    from ..settings import is_owner

    if not is_owner(tenant):
        fail(f"tenant {tenant!r}: use up to 64 letters, digits and . _ - @")


@keys.command()
def create(
    tenant: Annotated[str, typer.Argument(help="The tenant's name: letters, digits and . _ - @")],
    note: Annotated[
        str | None, typer.Option(help="What the key is for, as a reminder in `tinsmith keys list`.")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Create a key for a tenant and print it. It is not shown again: the server stores only its hash.

    Example: `export TINKER_API_KEY=$(tinsmith keys create alice --note laptop)`
    """
    from ..ledger import accounts

    _check_tenant(tenant)
    key, identifier = _in_ledger(
        data_dir, lambda connection: accounts.create_key(connection, tenant, note), make=True
    )
    typer.echo(key)
    typer.echo(f"key {identifier} of {tenant}; it is not shown again", err=True)


@keys.command("list")
def list_keys(data_dir: DataDir = None) -> None:
    """List every key in the ledger: its id, tenant, note, and when it was created and revoked.

    Keys that were given to `serve` with --api-key are not in the list.
    """
    from ..ledger import accounts

    def day(seconds: float) -> str:
        return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"

    for row in _in_ledger(data_dir, accounts.all_keys):
        state = f"created {day(row.created_at)}"
        if row.revoked_at is not None:
            state += f", revoked {day(row.revoked_at)}"
        typer.echo("  ".join(filter(None, (row.id, row.tenant, state, row.note))))


@keys.command("usage")
def show_usage(
    days: Annotated[int, typer.Option(min=1, help="How many days back.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, by tenant.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Show what each tenant has used: tokens trained, prefilled and sampled, and checkpoints saved.

    "cached" counts tokens of prompts that did not have to be prefilled, because they were in the cache.
    Usage is kept for TINSMITH_USAGE_SECONDS.

    Example: `tinsmith keys usage --days 7`
    """
    from ..ledger import accounts

    since = time.time() - days * 86400
    rows = _in_ledger(data_dir, lambda connection: accounts.tenants_usage(connection, since))
    if as_json:
        used = {row.owner: {name: int(getattr(row, name)) for name in accounts.COUNTERS} for row in rows}
        typer.echo(json.dumps(used, indent=2))
        return
    titles = ("tenant", "trained", "prefilled", "cached", "sampled", "checkpoints")
    cells = [[row.owner, *(f"{getattr(row, name):,}" for name in accounts.COUNTERS)] for row in rows]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    for tenant, *counts in (titles, *cells):
        numbers = (count.rjust(width) for count, width in zip(counts, widths[1:], strict=True))
        typer.echo("  ".join((tenant.ljust(widths[0]), *numbers)))


@keys.command()
def revoke(
    identifier: Annotated[str, typer.Argument(metavar="ID", help="The key's id, from `tinsmith keys list`.")],
    data_dir: DataDir = None,
) -> None:
    """Revoke a key for good. What its tenant has created stays, for the tenant's other keys.

    Example: `tinsmith keys revoke 1f0c9a2b`
    """
    from ..ledger import accounts

    if not _in_ledger(data_dir, lambda connection: accounts.revoke_key(connection, identifier)):
        fail(f"no key has the id {identifier!r}; tinsmith keys list shows them")
    typer.echo(f"key {identifier} is revoked")


@keys.command()
def quota(
    tenant: Annotated[str, typer.Argument(help="The tenant. Its key may also have been given to `serve`.")],
    models: Annotated[int | None, typer.Option(min=1, help="Live models.")] = None,
    checkpoint_bytes: Annotated[int | None, typer.Option(parser=_size, help="Bytes of checkpoints.")] = None,
    queued_operations: Annotated[
        int | None, typer.Option(min=1, help="Unanswered training operations.")
    ] = None,
    waiting_samples: Annotated[int | None, typer.Option(min=1, help="Unanswered samples.")] = None,
    requests_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Requests of any kind per second.")
    ] = None,
    queued_bytes: Annotated[
        int | None, typer.Option(parser=_size, help="Bytes of unanswered requests.")
    ] = None,
    metadata_bytes: Annotated[
        int | None, typer.Option(parser=_size, help="Bytes of tags, metadata and names.")
    ] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Start from the server's settings.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Set limits for one tenant, in place of the server's settings for all, and print them.

    The settings are TINSMITH_MAX_MODELS, TINSMITH_MAX_CHECKPOINT_BYTES, TINSMITH_MAX_QUEUED_OPERATIONS,
    TINSMITH_MAX_WAITING_SAMPLES, TINSMITH_MAX_REQUESTS_PER_SECOND, TINSMITH_MAX_QUEUED_BYTES and
    TINSMITH_MAX_METADATA_BYTES. A running server notices within two seconds. A tenant that already has more
    than a new limit keeps it, but gets no more.

    Example: `tinsmith keys quota alice --models 4 --checkpoint-bytes 10GB`
    """
    from ..ledger import tenancy

    _check_tenant(tenant)
    if queued_bytes == 0:
        fail("--queued-bytes: 0 would refuse every request; give at least 1")
    given = {
        "models": models,
        "checkpoint_bytes": checkpoint_bytes,
        "queued_operations": queued_operations,
        "waiting_samples": waiting_samples,
        "requests_per_second": requests_per_second,
        "queued_bytes": queued_bytes,
        "metadata_bytes": metadata_bytes,
    }

    def change(connection: Connection) -> dict[str, float]:
        known = {} if reset else tenancy.quotas(connection).get(tenant, {})
        wanted = known | {name: value for name, value in given.items() if value is not None}
        if reset or wanted != known:
            tenancy.set_quota(connection, tenant, wanted or None)
        return wanted

    wanted = _in_ledger(data_dir, change)
    for name, value in wanted.items():
        typer.echo(f"{name}  {value}")
    if not wanted:
        typer.echo(f"{tenant} has no limits of its own; the server's settings apply")
