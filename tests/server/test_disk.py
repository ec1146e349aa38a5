"""A full disk: what cannot be written was not accepted, and there is a way back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from small_disk import fill, small_disk
from sqlalchemy import Connection
from tinsmith.server.errors import StorageFull
from tinsmith.server.files import Disk
from tinsmith.server.ledger import operations, tenancy
from tinsmith.server.ledger.ledger import Ledger
from tinsmith.server.ledger.payloads import Stored


def add_operation(name: str, size: int):
    def change(connection: Connection) -> None:
        operations.add(
            connection,
            {
                "id": name,
                "owner": "me",
                "natural_key": name,
                "kind": "sample",
                "reply": {},
                "state": "accepted",
            },
            Stored(size, bytes(size)),
        )

    return change


async def test_a_ledger_without_room_says_so_and_goes_on_with_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        ledger = Ledger(f"sqlite:///{disk / 'ledger.db'}")
        await ledger.write(lambda connection: tenancy.ensure_tenant(connection, "me"))
        await ledger.write(add_operation("before", 1000))
        ballast = fill(disk, leave=200_000)
        with pytest.raises(StorageFull):
            await ledger.write(add_operation("large", 1 << 20))
        together = [ledger.write(add_operation(f"large {n}", 1 << 20)) for n in range(3)]
        outcomes = await asyncio.gather(*together, return_exceptions=True)
        assert [type(each) for each in outcomes] == [StorageFull] * 3
        assert [row.id for row in await ledger.read(operations.unfinished)] == ["before"]
        ballast.unlink()
        await ledger.write(add_operation("large", 1 << 20))
        ledger.close()
        again = Ledger(f"sqlite:///{disk / 'ledger.db'}")
        assert [row.id for row in await again.read(operations.unfinished)] == ["before", "large"]
        again.close()


def test_the_reserve_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinsmith.server.files._FRESH_SECONDS", 0.0)
    with small_disk(tmp_path / "disk", "4m") as folder:
        disk = Disk(folder, reserve_bytes=1 << 20)
        disk.require_room()
        ballast = fill(folder, leave=(1 << 20) - 8192)
        with pytest.raises(StorageFull, match="0 MiB left, of which 1 MiB"):
            disk.require_room()
        ballast.unlink()
        disk.require_room()
