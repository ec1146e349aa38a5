"""The limit of a body's bytes, whatever its Content-Length says."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

from fuzz.campaign import campaign
from gates import gate
from starlette.types import Message

MAX_BYTES = 100


def upload(rng: random.Random) -> tuple[str | None, list[bytes]]:
    """A Content-Length, honest or not, and the pieces of a body."""
    pieces = [bytes(rng.choice((0, 1, 40, 60, 100, 101))) for _ in range(rng.randint(1, 4))]
    length = str(sum(map(len, pieces)))
    odd = ["", "-1", "1e3", "0x10", "²", "9" * 5000, "1" * 20, "+5", " 7", "100", "101", "5, 5", "\xff"]
    return rng.choice([None, length, length, rng.choice(odd)]), pieces


@campaign(upload)
def test_body_limit(case: tuple[str | None, list[bytes]]) -> None:
    declared, pieces = case
    sent: list[Message] = []
    seen = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal seen
        while (message := await receive())["type"] == "http.request":
            seen += len(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    inbox = [
        {"type": "http.request", "body": piece, "more_body": at < len(pieces) - 1}
        for at, piece in enumerate(pieces)
    ]

    async def receive() -> Message:
        return inbox.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    if declared is not None:
        headers.append((b"content-length", declared.encode("latin-1")))
    scope = {"type": "http", "path": "/", "method": "POST", "query_string": b"", "headers": headers}
    with suppress(StopIteration):
        gate(app, max_bytes=MAX_BYTES)(scope, receive, send).send(None)
    total = sum(map(len, pieces))
    (status,) = (message["status"] for message in sent if message["type"] == "http.response.start")
    assert seen <= MAX_BYTES
    assert status in ((413,) if total > MAX_BYTES else (200, 413))
    if declared in (None, str(total)):
        assert status == (413 if total > MAX_BYTES else 200)
