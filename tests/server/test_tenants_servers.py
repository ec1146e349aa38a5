"""SGLang servers that tenants name may be anything: what they get of this server, and what they cannot do."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import socket
import stat
import time
import zlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import text
from tinsmith.server import addresses
from tinsmith.server.addresses import Allowed, NotAllowed
from tinsmith.server.base_models import BaseModel, resolve
from tinsmith.server.ledger import plugins as plugin_rows
from tinsmith.server.ledger import tenancy
from tinsmith.server.ledger.ledger import Ledger
from tinsmith.server.plugins.sglang.endpoint import (
    AnswerBytes,
    Endpoint,
    EndpointBusy,
    EndpointDied,
    EndpointError,
    EndpointRefused,
)
from tinsmith.server.plugins.sglang.endpoints import MAX_ENDPOINTS, Endpoints, Registry
from tinsmith.server.settings import Settings
from tiny_models import write_model

SECRET = "aws-secret-access-key"
DRAW = {"input_ids": [5], "sampling_params": {"max_new_tokens": 2}}
Answer = Callable[[str, asyncio.StreamWriter], None]


class Anything:
    """An HTTP server that answers with whatever bytes a test says, and remembers what it was asked."""

    def __init__(self, answer: Answer):
        self.answer = answer
        self.heads: list[str] = []
        self.port = 0

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.heads.append(head)
                length = next(
                    (line for line in head.splitlines() if line.lower().startswith("content-l")), "0"
                )
                await reader.readexactly(int(length.rpartition(" ")[2]))
                self.answer(head.split()[1], writer)
                await writer.drain()


@contextlib.asynccontextmanager
async def anything(answer: Answer) -> AsyncIterator[Anything]:
    there = Anything(answer)
    server = await asyncio.start_server(there.connected, "127.0.0.1", 0)
    there.port = server.sockets[0].getsockname()[1]
    try:
        yield there
    finally:
        server.close()


def reply(writer: asyncio.StreamWriter, body: bytes, status: str = "200 OK", **headers: str) -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n"
    head += "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    writer.write(head.encode() + b"\r\n" + body)


def sglang(path: str, writer: asyncio.StreamWriter) -> None:
    """Answer as a small SGLang does."""
    info = {
        "model_path": "tiny",
        "weight_version": "default",
        "max_total_num_tokens": 512,
        "context_length": 64,
    }
    row = [[-0.1, 1, None], [-0.3, 2, None]]
    drawn = {"output_ids": [1], "meta_info": {"output_top_logprobs": [row]}}
    reply(writer, json.dumps([drawn] if path == "/generate" else info).encode())


def tenants(port: int, host: str = "127.0.0.1", answer_bytes: AnswerBytes | None = None) -> Endpoint:
    return Endpoint(f"http://{host}:{port}", "sk-key", Allowed([], ["127.0.0.1"]), answer_bytes)


@pytest.mark.parametrize(
    "answer",
    [
        partial(reply, body=b"", status="302 Found", Location="http://169.254.169.254/latest/meta-data"),
        partial(reply, body=SECRET.encode(), status="301 Moved", Location="/elsewhere"),
        partial(reply, body=SECRET.encode(), status="401 Unauthorized"),
        partial(reply, body=json.dumps({"error": {"message": SECRET}}).encode(), status="400 Bad Request"),
        partial(reply, body=json.dumps({"message": SECRET}).encode(), status="503 Unavailable"),
        partial(reply, body=json.dumps({"success": False, "message": SECRET}).encode()),
        partial(reply, body=SECRET.encode()),
        partial(reply, body=json.dumps([SECRET]).encode()),
        lambda writer: writer.write(f"SSH-2.0-{SECRET}\r\n\r\n".encode()),
        lambda writer: writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {SECRET}\r\n\r\n".encode()),
    ],
)
async def test_nothing_that_it_answers_is_repeated_and_nowhere_else_is_asked(answer: Callable) -> None:
    async with anything(lambda _path, writer: answer(writer=writer)) as there:
        client = tenants(there.port)
        for asked in (client.model_info(), client.generate(DRAW), anext(client.stream(DRAW))):
            with pytest.raises((EndpointError, StopAsyncIteration)) as refused:
                await asked
            assert SECRET not in str(refused.value)
            assert "169.254" not in str(refused.value)
        assert all("/elsewhere" not in head for head in there.heads)
        assert len(there.heads) == 3
        await client.close()


async def test_the_operator_s_own_servers_say_what_is_wrong() -> None:
    body = json.dumps({"error": {"message": "no such adapter"}}).encode()
    async with anything(lambda _path, writer: reply(writer, body, "400 Bad Request")) as there:
        client = Endpoint(f"http://127.0.0.1:{there.port}")
        with pytest.raises(EndpointRefused, match="no such adapter"):
            await client.generate(DRAW)
        await client.close()


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, identity"])
async def test_compressed_answers_are_not_read(encoding: str) -> None:
    zeros = json.dumps({"model_path": "0" * (1 << 20)}).encode()
    body = zlib.compress(zeros) if encoding == "deflate" else gzip.compress(zeros)
    async with anything(lambda _path, writer: reply(writer, body, Content_Encoding=encoding)) as there:
        client = tenants(there.port)
        for asked in (client.model_info(), client.generate(DRAW), anext(client.stream(DRAW))):
            with pytest.raises(EndpointRefused, match="compressed"):
                await asked
        assert "accept-encoding: identity" in there.heads[0].lower()
        await client.close()


async def test_an_answer_is_as_long_as_what_was_asked_for() -> None:
    """Two tokens are not megabytes, neither whole nor as a line of a stream; nor is a stream endless."""

    def endless(path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + b" " * (4 << 20))

    async with anything(endless) as there:
        client = tenants(there.port)
        for asked in (client.model_info(), client.generate(DRAW), anext(client.stream(DRAW))):
            with pytest.raises(EndpointRefused, match="longer than"):
                await asked
        await client.close()

    for line, why in ((b"data: {}\n", "more parts than tokens"), (b": still here\n", "longer than")):
        body = b"HTTP/1.1 200 OK\r\n\r\n" + line * (1 << 17)
        async with anything(lambda _path, writer, body=body: writer.write(body)) as there:
            client = tenants(there.port)
            with pytest.raises(EndpointRefused, match=why):
                async for _part in client.stream(DRAW):
                    pass
            await client.close()

    long = json.dumps([{"text": "a" * (1 << 20)}]).encode()
    async with anything(lambda _path, writer: reply(writer, long)) as there:
        client = tenants(there.port)
        many = DRAW | {"sampling_params": {"max_new_tokens": 4096, "n": 2}}
        assert len((await client.generate(many))[0]["text"]) == 1 << 20
        await client.close()
        answer_bytes = AnswerBytes(1 << 19)
        client = tenants(there.port, answer_bytes=answer_bytes)
        with pytest.raises(EndpointBusy, match="at once"):
            await client.generate(many)
        assert answer_bytes.take(1 << 19), "what was read is forgotten"
        await client.close()


async def test_an_answer_that_drips_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinsmith.server.plugins.sglang.endpoint._QUICK_SECONDS", 0.4)

    def drip(path: str, writer: asyncio.StreamWriter) -> None:
        async def slowly() -> None:
            with contextlib.suppress(ConnectionError):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(1000):
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.sleep(0.1)

        tasks.append(asyncio.ensure_future(slowly()))

    tasks: list[asyncio.Task[None]] = []
    async with anything(drip) as there:
        client = tenants(there.port)
        started_at = time.monotonic()
        with pytest.raises(EndpointDied):
            await client._ask("GET", "/model_info", seconds=0.5)
        assert time.monotonic() - started_at < 5
        await client.close()
    for task in tasks:
        task.cancel()


async def test_a_name_is_resolved_once_and_its_address_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that leads elsewhere later (DNS rebinding) does not lead this server there."""
    answers = {"gpu.example": "127.0.0.1"}
    looked_up: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *args, **kwargs):
        looked_up.append(host)
        return real(answers.get(host, host), port, *args, **kwargs)

    monkeypatch.setattr(addresses.socket, "getaddrinfo", getaddrinfo)
    async with anything(sglang) as there:
        client = Endpoint(f"http://gpu.example:{there.port}", None, Allowed([], ["gpu.example"]))
        assert (await client.model_info())["model_path"] == "tiny"
        assert f"host: gpu.example:{there.port}" in there.heads[0].lower()
        assert looked_up.count("gpu.example") == 1
        for elsewhere in ("169.254.169.254", "0.0.0.0", "224.0.0.1", "::ffff:169.254.169.254"):
            answers["gpu.example"] = elsewhere
            with pytest.raises(EndpointDied) as refused:
                await client.model_info()
            assert elsewhere not in refused.value.message
        assert len(there.heads) == 1
        await client.close()
    allowed = Allowed([], ["10.0.0.0/8", "127.0.0.1"])
    looked_up.clear()
    for host in ("gpu.example", "2130706433", "127.1", "0x7f000001"):
        with pytest.raises(NotAllowed):
            await allowed.resolve(host, 80)
    assert not looked_up, "nobody resolves a name that is not allowed"
    assert await allowed.resolve("::ffff:10.1.2.3", 80) == ["10.1.2.3"]
    assert "127.0.0.1" in await allowed.resolve("localhost", 80)


async def test_each_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, `localhost` may be ::1 first, while the server listens on 127.0.0.1."""
    found = [(0, 0, 0, "", (host, 0)) for host in ("169.254.1.1", "::1", "127.0.0.1")]
    monkeypatch.setattr(addresses.socket, "getaddrinfo", lambda *_args, **_kwargs: found)
    async with anything(sglang) as there:
        client = Endpoint(f"http://localhost:{there.port}", None, Allowed([], ["localhost"]))
        assert (await client.model_info())["model_path"] == "tiny"
        assert len(await client.generate(DRAW)) == 1
        await client.close()


# --- the registry


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = write_model(tmp_path_factory.mktemp("models") / "tiny", "llama")
    return resolve(f"tiny={folder}", folder.parent, None)


class Start:
    """The registry on a ledger, as a server has it; made again, it is a new start."""

    def __init__(self, data_dir: Path, model: BaseModel, *allowed: str):
        self.settings = Settings(data_dir=data_dir, sglang_allow=list(allowed))
        self.ledger = Ledger(self.settings.ledger_url)
        self.endpoints = Endpoints({"tiny": model})
        self.registry = Registry(self.settings, self.ledger, self.endpoints)

    async def __aenter__(self) -> Start:
        for owner in ("alice", "bob"):
            await self.ledger.write(partial(tenancy.ensure_tenant, tenant=owner))
        await self.registry.start()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.endpoints.close()
        self.registry.close()
        self.ledger.close()

    async def add(self, port: int, owner: str = "alice", **fields: object) -> str | None:
        return await self.registry.add(owner, "127.0.0.1", port, {"is_this": False, **fields})


def ledger_has(data_dir: Path, secret: str) -> bool:
    files = list(data_dir.glob("ledger.db*"))
    assert files
    return any(secret.encode() in file.read_bytes() for file in files)


async def test_keys_are_encrypted_at_rest(tmp_path: Path, model: BaseModel) -> None:
    async with anything(sglang) as there:
        async with Start(tmp_path, model, "127.0.0.1") as first:
            assert await first.add(there.port, api_key="sk-very-secret", pool="mine") is None
            assert "Bearer sk-very-secret" in there.heads[-1]
            (row,) = await first.ledger.read(plugin_rows.all_endpoints)
            assert "sk-very-secret" not in str(row.fields)
            assert row.fields["pool"] == "mine"
        assert not ledger_has(tmp_path, "sk-very-secret")
        there.heads.clear()
        async with Start(tmp_path, model, "127.0.0.1") as again:
            (endpoint,) = again.endpoints.all("tiny", "alice") or again.endpoints.all(None, "alice")
            await endpoint.checked.wait()
            assert endpoint.healthy
            assert "Bearer sk-very-secret" in there.heads[-1]
        (tmp_path / "endpoint_identity").unlink()
        async with Start(tmp_path, model, "127.0.0.1") as lost:
            assert lost.endpoints.all(None, "alice") == []
            place = ("alice", "127.0.0.1", there.port)
            assert "add it again with its key" in lost.registry.problems[place]
            assert await lost.registry.remove(*place)
            assert await lost.add(there.port, api_key="sk-very-secret") is None


async def test_keys_of_an_older_ledger_are_encrypted_at_the_start(tmp_path: Path, model: BaseModel) -> None:
    async with anything(sglang) as there:
        async with Start(tmp_path, model) as before:
            fields = {"is_this": False, "api_key": "sk-very-secret", "pool": "default"}
            await before.ledger.write(
                lambda connection: plugin_rows.add_endpoint(
                    connection, "alice", "127.0.0.1", there.port, fields, 9
                )
            )
        assert ledger_has(tmp_path, "sk-very-secret")
        async with Start(tmp_path, model, "127.0.0.1") as after:
            (endpoint,) = after.endpoints.all(None, "alice")
            await endpoint.checked.wait()
            assert "Bearer sk-very-secret" in there.heads[-1]
        assert not ledger_has(tmp_path, "sk-very-secret")


async def test_only_what_the_operator_allows_is_asked(tmp_path: Path, model: BaseModel) -> None:
    """Also on a server that listens on loopback alone; and also what an earlier start allowed."""
    async with anything(sglang) as there:
        async with Start(tmp_path, model) as start:
            assert "--sglang-allow" in str(await start.add(there.port))
            for host in ("localhost", "::1", "::ffff:127.0.0.1", "169.254.169.254", "127.1", "0.0.0.0"):
                problem = await start.registry.add("alice", host, there.port, {"is_this": False})
                assert "--sglang-allow" in str(problem), host
        assert there.heads == []
        async with Start(tmp_path, model, f"127.0.0.1:{there.port}") as start:
            assert await start.add(there.port) is None
            assert "--sglang-allow" in str(await start.add(there.port + 1))
        there.heads.clear()
        async with Start(tmp_path, model) as start:
            assert start.endpoints.everybody() == []
            assert "allow" in start.registry.problems["alice", "127.0.0.1", there.port]
        assert there.heads == []


async def test_a_tenant_has_so_many_servers(tmp_path: Path, model: BaseModel) -> None:
    """Also while they are being added: each of them is asked before it is registered."""
    async with anything(lambda _path, _writer: None) as silent, Start(tmp_path, model, "127.0.0.1") as start:
        adding = [
            asyncio.ensure_future(
                start.registry.add("alice", f"127.0.0.{n}", silent.port, {"is_this": False})
            )
            for n in range(1, 2)
        ]
        start.registry._allowed._hosts |= {f"127.0.1.{n}" for n in range(256)}
        adding += [
            asyncio.ensure_future(
                start.registry.add("alice", f"127.0.1.{n}", silent.port, {"is_this": False})
            )
            for n in range(MAX_ENDPOINTS)
        ]
        await asyncio.sleep(0.1)
        assert len(start.endpoints.everybody()) == MAX_ENDPOINTS
        assert adding[-1].done()
        assert "are being added" in str(await adding[-1])
        for task in adding:
            task.cancel()
        await asyncio.gather(*adding, return_exceptions=True)


# --- files


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_only_the_server_s_user_reads_the_ledger_and_secrets(tmp_path: Path, model: BaseModel) -> None:
    before = os.umask(0)
    try:
        data_dir = tmp_path / "a" / "data"
        from tinsmith.server.files import make_directory

        make_directory(data_dir)
        assert mode(data_dir) == 0o700
        make_directory(data_dir)
        async with anything(sglang) as there, Start(data_dir, model, "127.0.0.1") as start:
            assert await start.add(there.port, api_key="sk-very-secret") is None
            files = sorted(data_dir.iterdir())
            assert {"ledger.db", "ledger.db-shm", "ledger.db-wal", "endpoint_identity"} <= {
                f.name for f in files
            }
            assert {file.name: mode(file) for file in files if mode(file) != 0o600} == {}
        (data_dir / "ledger.db").chmod(0o644)  # of an earlier version
        ledger = Ledger(f"sqlite:///{data_dir / 'ledger.db'}")
        await ledger.write(lambda connection: connection.execute(text("SELECT 1")).scalar())
        assert {mode(file) for file in data_dir.glob("ledger.db*")} == {0o600}
        ledger.close()
    finally:
        os.umask(before)
