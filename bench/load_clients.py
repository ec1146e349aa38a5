"""Clients for `load.py`: some train and sample as the SDK does, others keep polls open."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
from latency import forward_backward_body

HEADERS = {"X-API-Key": "tml-bench"}
HELD_SEQ_ID = 1_000_000  # an operation that waits for earlier ones, which never come
PATIENCE_SECONDS = 360  # how long the SDK resends a request


@dataclass
class Tally:
    """Counts of answers. `errors` counts those that a caller of the SDK would see."""

    requests: int = 0
    steps: int = 0
    samples: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)


class Client:
    """One session with one model. Until the end, it trains, and samples after every other step."""

    def __init__(self, url: str, tally: Tally):
        self._http = httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=120)
        self._tally = tally
        self.held = ""  # the request id of the operation that waits

    async def create(self) -> None:
        session = (await self._post("create_session"))["session_id"]
        created = await self._post(
            "create_model", session_id=session, model_seq_id=0, base_model="base", lora_config={"rank": 8}
        )
        self._model = (await self._wait(created))["model_id"]
        self.held = (
            await self._post("optim_step", model_id=self._model, seq_id=HELD_SEQ_ID, adam_params={})
        )["request_id"]

    async def run(self, until: float) -> None:
        seq_id = 1
        while time.monotonic() < until:
            try:
                await self._step(seq_id)
                if seq_id % 4 == 1:
                    await self._sample()
            except Exception as error:
                self._tally.errors[f"{type(error).__name__}: {error}"[:200]] += 1
            seq_id += 2
        await self._http.aclose()

    async def _step(self, seq_id: int) -> None:
        body = forward_backward_body(self._model, seq_id)
        first = await self._send(
            "forward_backward", content=body, headers={"Content-Type": "application/x-protobuf"}
        )
        second = await self._post("optim_step", model_id=self._model, seq_id=seq_id + 1, adam_params={})
        await asyncio.gather(self._wait(first), self._wait(second))
        self._tally.steps += 1

    async def _sample(self) -> None:
        submitted = await self._post(
            "asample",
            base_model="base",
            prompt={"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7, 8]}]},
            sampling_params={"max_tokens": 8, "seed": 1},
        )
        await self._wait(submitted)
        self._tally.samples += 1

    async def _wait(self, submitted: dict) -> dict:
        while (answer := await self._send("retrieve_future", json=submitted)).get("type") == "try_again":
            pass
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    async def _post(self, path: str, **body: object) -> dict:
        return await self._send(path, json=body)

    async def _send(self, path: str, **request) -> dict:
        """Send a request, again where the SDK would: if told to wait or without a connection.

        Raises for any other status."""
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            answer = await self._http.post(f"/api/v1/{path}", **request)
            self._tally.requests += 1
            self._tally.statuses[answer.status_code] += 1
            if answer.status_code in (429, 503) and time.monotonic() < until:
                await asyncio.sleep(float(answer.headers.get("Retry-After", 1)))
                continue
            if answer.status_code != 408:
                answer.raise_for_status()
            return answer.json()


async def hold_poll(url: str, request_id: str, tally: Tally, until: float) -> None:
    """Long-poll an operation that gets no answer, again on the same connection whenever told to try again.

    This is written without httpx, which looks through all connections of its pool at every request.
    """
    where = urlsplit(url)
    body = json.dumps({"request_id": request_id}).encode()
    head = (
        f"POST /api/v1/retrieve_future HTTP/1.1\r\nHost: {where.netloc}\r\nX-API-Key: {HEADERS['X-API-Key']}"
        f"\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        while time.monotonic() < until:
            writer.write(head + body)
            status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            code = int(status.split()[1])
            headers = dict(line.lower().split(": ", 1) for line in lines if line)
            await reader.readexactly(int(headers.get("content-length", 0)))
            tally.requests += 1
            tally.statuses[code] += 1
            if code != 408:
                tally.errors[f"an open poll was answered {code}"] += 1
                return
    except (OSError, asyncio.IncompleteReadError) as error:
        tally.errors[f"an open poll: {error!r}"] += 1
    finally:
        writer.close()
