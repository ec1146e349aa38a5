"""One SGLang server by its HTTP contract (that of 0.5.23). What it serves, and for whom: endpoints.py."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import httpx

_QUICK_SECONDS = 5.0  # to connect, and for what computes nothing
_LOAD_SECONDS = 1800.0  # weights from a disk; an unload waits for those who use the adapter
_FLUSH_SECONDS = 60.0
_NOT_FLUSHED = "cache was not flushed"  # said where the weights were updated, and their version was not
_UPDATES = 5
# Its HTTP server closes connections that are idle for five seconds; a request that is sent just then is lost.
_KEEPALIVE_SECONDS = 2.0
_MESSAGE_CHARACTERS = 500


class EndpointError(Exception):
    """`message` names the server's URL, and never its key."""

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message


class EndpointRefused(EndpointError):
    """It lives, and does not do this."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class EndpointBusy(EndpointError):
    """It lives, and has no room now."""


class EndpointUnflushed(EndpointBusy):
    """It has new weights with the cache of those before, and says that it has those before."""


class EndpointDied(EndpointError):
    """It cannot be reached, hung up or is silent. It may come back with nothing of what it had."""


class EndpointSilent(EndpointDied):
    """It did not answer in time; perhaps the machine is busy."""


class CannotServe(EndpointError):
    """It cannot have these weights, or serve this request as it was asked: another has to."""


PauseMode = Literal["abort", "retract", "in_place"]


class Endpoint:
    """`url` has no slash at its end."""

    def __init__(self, url: str, api_key: str | None = None):
        self.url = url.rstrip("/")
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=_QUICK_SECONDS,
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEPALIVE_SECONDS),
            trust_env=False,  # no proxy, and no key from a netrc file
        )

    async def close(self) -> None:
        await self._http.aclose()

    # --- how it is

    async def ready(self) -> bool:
        """Whether it has loaded its model."""
        try:
            await self._ask("GET", "/ready")
        except EndpointError:
            return False
        return True

    async def model_info(self) -> dict[str, Any]:
        """`model_path`, `weight_version` and more. Cheap, unlike `/health`, which draws a token."""
        return _object(await self._ask("GET", "/model_info"), "/model_info")

    async def server_info(self) -> dict[str, Any]:
        """All it was started with. There may be secrets in it."""
        return _object(await self._ask("GET", "/server_info"), "/server_info")

    # --- samples

    async def generate(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """A list also of one. As long as it takes: whoever asks watches over the server meanwhile."""
        answer = await self._ask("POST", "/generate", body, None)
        return answer if isinstance(answer, list) else [_object(answer, "/generate")]

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Each part has all there is so far."""
        async with self._streamed(body) as answer:
            async for line in answer.aiter_lines():
                said = line.removeprefix("data:").strip()
                if not line.startswith("data:") or said == "[DONE]":
                    continue
                part = json.loads(said)
                if "error" in part:
                    raise EndpointRefused(f"{self.url}/generate: {_reason(part)}")
                yield part

    @asynccontextmanager
    async def _streamed(self, body: dict[str, Any]) -> AsyncIterator[httpx.Response]:
        timeout = httpx.Timeout(_QUICK_SECONDS, read=None)
        asked = self._http.stream("POST", "/generate", json=body | {"stream": True}, timeout=timeout)
        try:
            async with asked as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    self._read(answer, "/generate")
                yield answer
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            raise self._died("/generate", error) from None

    async def abort_request(self, rid: str) -> None:
        """One that has ended, or is unknown, is none."""
        await self._ask("POST", "/abort_request", {"rid": rid})

    # --- weights

    async def load_lora_adapter(self, name: str, path: str, pinned: bool = False) -> dict[str, str]:
        """The adapters that it has then, by name, and their folders."""
        body = {"lora_name": name, "lora_path": path, "pinned": pinned}
        answer = await self._ask("POST", "/load_lora_adapter", body, _LOAD_SECONDS)
        return _object(answer, "/load_lora_adapter").get("loaded_adapters") or {}

    async def unload_lora_adapter(self, name: str) -> dict[str, str]:
        """Those that it still has. Waits for requests that use it."""
        answer = await self._ask("POST", "/unload_lora_adapter", {"lora_name": name}, _LOAD_SECONDS)
        return _object(answer, "/unload_lora_adapter").get("loaded_adapters") or {}

    async def update_weights_from_disk(self, path: str, weight_version: str) -> dict[str, Any]:
        """Waits for the requests that run, and flushes the cache. A tensor of another shape kills it.

        Raises EndpointUnflushed if it has them from some time on, and does not come to say so."""
        body = {"model_path": path, "weight_version": weight_version}
        is_unflushed, problem = False, ""
        for _ in range(_UPDATES):
            try:
                if is_unflushed:
                    await self.flush_cache(_FLUSH_SECONDS)
                answer = await self._ask("POST", "/update_weights_from_disk", body, _LOAD_SECONDS)
                return _object(answer, "/update_weights_from_disk")
            except EndpointError as error:
                # Its last request has just ended, and is not yet forgotten; or others sample there.
                is_unflushed |= isinstance(error, EndpointRefused) and _NOT_FLUSHED in error.message
                if not is_unflushed:
                    raise
                problem = error.message
        raise EndpointUnflushed(problem)

    async def pause_generation(self, mode: PauseMode) -> None:
        await self._ask("POST", "/pause_generation", {"mode": mode}, _LOAD_SECONDS)

    async def continue_generation(self) -> None:
        await self._ask("POST", "/continue_generation", {})

    async def flush_cache(self, patience_seconds: float) -> None:
        """As soon as no request runs; raises EndpointBusy if one still does after so long."""
        path = f"/flush_cache?timeout={patience_seconds:g}"
        try:
            await self._ask("POST", path, seconds=_QUICK_SECONDS + patience_seconds)
        except EndpointRefused as error:
            raise EndpointBusy(error.message) from None

    # --- the wire

    async def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        seconds: float | None = _QUICK_SECONDS,
    ) -> Any:
        timeout = httpx.Timeout(_QUICK_SECONDS, read=seconds)
        try:
            answer = await self._http.request(method, path, json=body, timeout=timeout)
        except httpx.HTTPError as error:
            raise self._died(path, error) from None
        return self._read(answer, path)

    def _died(self, path: str, error: Exception) -> EndpointDied:
        kind = EndpointSilent if isinstance(error, httpx.TimeoutException) else EndpointDied
        return kind(f"{self.url}{path}: {type(error).__name__} {error}".rstrip())

    def _read(self, answer: httpx.Response, path: str) -> Any:
        """What it says, null where that is nothing. Raises EndpointError."""
        try:
            said = answer.json() if answer.content else None
        except ValueError:
            said = answer.text if answer.status_code != 200 or path == "/generate" else None
        status, where = answer.status_code, f"{self.url}{path}"
        if status == 200 and not (isinstance(said, dict) and said.get("success") is False):
            return said
        reason = f"{where} is answered {status}: {_reason(said)}"
        if status in (429, 503):
            raise EndpointBusy(reason)
        if status in (502, 504):
            raise EndpointDied(reason)
        raise EndpointRefused(reason, status)


def _object(said: Any, path: str) -> dict[str, Any]:
    if not isinstance(said, dict):
        raise EndpointRefused(f"{path} is not answered with an object")
    return said


def _reason(said: Any) -> str:
    """Of the shapes that errors have."""
    if isinstance(said, dict):
        found = said.get("error") or said.get("error_message") or said.get("message") or said
        said = found.get("message", found) if isinstance(found, dict) else found
    return str(said)[:_MESSAGE_CHARACTERS]
