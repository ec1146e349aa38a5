"""One SGLang server, through its HTTP contract (that of 0.5.23), and the limits that it reports.

A tenant's server may be anything. Its answers are bounded in bytes and never decompressed, redirects are
not followed, and nothing that an unexpected answer says is repeated to the tenant. Each request goes to
an address that was checked for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import orjson

from ...addresses import Allowed, NotAllowed
from ...base_models import BaseModel


class PinnedTransport(httpx.AsyncBaseTransport):
    """An HTTP transport that resolves a request's host once, and connects only to allowed addresses.

    So a name that leads to an allowed address at its registration and elsewhere later (DNS rebinding) is
    refused. The `Host` header and the TLS name stay the same.
    """

    def __init__(self, allowed: Allowed, limits: httpx.Limits):
        self._allowed = allowed
        self._inner = httpx.AsyncHTTPTransport(limits=limits, trust_env=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host, port = request.url.host, request.url.port or (443 if request.url.scheme == "https" else 80)
        try:
            found = await self._allowed.resolve(host, port)
        except NotAllowed as error:
            raise httpx.ConnectError(str(error), request=request) from None
        except (OSError, TimeoutError, ValueError) as error:
            raise httpx.ConnectError(f"the name {host!r} cannot be resolved", request=request) from error
        for each in found[:-1]:
            with contextlib.suppress(httpx.ConnectError, httpx.ConnectTimeout):
                return await self._send(request, host, each)
        return await self._send(request, host, found[-1])

    async def _send(self, request: httpx.Request, host: str, address: str) -> httpx.Response:
        pinned = httpx.Request(
            request.method,
            request.url.copy_with(host=address),
            headers=request.headers,
            stream=request.stream,
            extensions=request.extensions | {"sni_hostname": host},
        )
        return await self._inner.handle_async_request(pinned)

    async def aclose(self) -> None:
        await self._inner.aclose()


_QUICK_SECONDS = 5.0  # to connect, and for requests that compute nothing
_LOAD_SECONDS = 1800.0  # to load weights from a disk; an unload waits for running requests
_FLUSH_SECONDS = 60.0
_NOT_FLUSHED = "cache was not flushed"  # SGLang's error when weights were updated and their version was not
_UPDATES = 5
# SGLang closes connections after five idle seconds, and a request sent at that moment would be lost.
_KEEPALIVE_SECONDS = 2.0
_MESSAGE_CHARACTERS = 500
# Bytes of answers: about the server and weights; per token of samples, and at most.
_PLAIN_BYTES = 1 << 20
_TOKEN_BYTES, _MOST_BYTES = 256, 256 << 20
_TENANT_BYTES = 64 << 20
_LONGEST_CONTEXT = 1 << 20  # tokens, if a request has no limit
_QUICKLY_PARSED = 64 << 10
_MORE_PARTS = 16  # parts that a stream may have beyond its tokens


class EndpointError(Exception):
    """A request to an SGLang server failed.

    `message` is for the client: it names the server's URL, never its key. `detail` may quote the server, and
    stays in this server.
    """

    def __init__(self, message: str, detail: str = ""):
        super().__init__(message)
        self.message = message
        self.detail = detail or message


class EndpointRefused(EndpointError):
    """The server is alive and refuses the request."""

    def __init__(self, message: str, status: int = 400, detail: str = ""):
        super().__init__(message, detail)
        self.status = status


class EndpointBusy(EndpointError):
    """The server is alive and has no room now."""


class EndpointUnflushed(EndpointBusy):
    """The server has new weights, but the old cache and the old version's name."""


class EndpointDied(EndpointError):
    """The server cannot be reached, hung up or is silent. It may restart without its adapters."""


class EndpointSilent(EndpointDied):
    """The server did not answer in time; its machine may be busy."""


class CannotServe(EndpointError):
    """The server cannot have these weights, or cannot serve this request exactly: another one has to."""


PauseMode = Literal["abort", "retract", "in_place"]


class AnswerBytes:
    """The bytes of answers that may be held at once, of all servers of a tenant or without a limit."""

    def __init__(self, limit: float = math.inf):
        self._limit = limit
        self._held = 0

    def take(self, size: int) -> bool:
        """Reserve bytes; return whether there was room."""
        if self._held + size > self._limit:
            return False
        self._held += size
        return True

    def give_back(self, size: int) -> None:
        self._held -= size


class Endpoint:
    """The HTTP client of one SGLang server.

    `url` has no slash at its end. `allowed`: the addresses that a tenant's server may have; None: it is the
    operator's. `answer_bytes` is shared by the servers of a tenant.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        allowed: Allowed | None = None,
        answer_bytes: AnswerBytes | None = None,
    ):
        self.url = url.rstrip("/")
        self.is_operators = allowed is None
        self._answer_bytes = answer_bytes or AnswerBytes()
        self._most_bytes = _MOST_BYTES if self.is_operators else _TENANT_BYTES
        limits = httpx.Limits(max_connections=None, keepalive_expiry=_KEEPALIVE_SECONDS)
        key = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=key | {"Accept-Encoding": "identity"},
            timeout=_QUICK_SECONDS,
            limits=limits,
            transport=None if allowed is None else PinnedTransport(allowed, limits),
            follow_redirects=False,
            trust_env=False,  # no proxy, and no key from a netrc file
        )

    async def close(self) -> None:
        await self._http.aclose()

    # --- how it is

    async def ready(self) -> bool:
        """Return whether the server has loaded its model."""
        try:
            await self._ask("GET", "/ready")
        except EndpointError:
            return False
        return True

    async def model_info(self) -> dict[str, Any]:
        """Return `model_path`, `weight_version` and more. Cheap, unlike `/health`, which draws a token."""
        return _object(await self._ask("GET", "/model_info"), "/model_info")

    async def server_info(self) -> dict[str, Any]:
        """Return the server's arguments, which may contain secrets."""
        return _object(await self._ask("GET", "/server_info"), "/server_info")

    # --- samples

    async def generate(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the answers, a list even for one. No time limit: the caller watches the server's health."""
        answer = await self._ask("POST", "/generate", body, None, self._sample_bytes(body))
        return [_object(each, "/generate") for each in (answer if isinstance(answer, list) else [answer])]

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield the parts of a streamed answer; each has the whole text so far."""
        parts = beside = 0
        async with self._answered("POST", "/generate", body | {"stream": True}, None) as answer:
            if answer.status_code != 200:
                await self._read(answer, "/generate", _PLAIN_BYTES)
            async for line in self._lines(answer, self._sample_bytes(body)):
                data = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or data == b"[DONE]":
                    beside += len(line) + 1  # comments, which keep connections alive
                    if beside > _PLAIN_BYTES:
                        raise self._too_long("/generate", _PLAIN_BYTES)
                    continue
                part = _object(orjson.loads(data), "/generate")
                if "error" in part:
                    raise self._refused("/generate", "refused", part)
                parts += 1
                if parts > _most_tokens(body) + _MORE_PARTS:
                    raise EndpointRefused(f"{self.url}/generate: a stream has more parts than tokens")
                yield part

    async def abort_request(self, rid: str) -> None:
        """Abort a request. Unknown and finished ones are ignored."""
        await self._ask("POST", "/abort_request", {"rid": rid})

    # --- weights

    async def load_lora_adapter(self, name: str, path: str) -> dict[str, str]:
        """Load an adapter; return all loaded ones by name, with their folders."""
        body = {"lora_name": name, "lora_path": path}
        answer = await self._ask("POST", "/load_lora_adapter", body, _LOAD_SECONDS)
        return _object(answer, "/load_lora_adapter").get("loaded_adapters") or {}

    async def unload_lora_adapter(self, name: str) -> dict[str, str]:
        """Unload an adapter once no request uses it; return the ones that are left."""
        answer = await self._ask("POST", "/unload_lora_adapter", {"lora_name": name}, _LOAD_SECONDS)
        return _object(answer, "/unload_lora_adapter").get("loaded_adapters") or {}

    async def update_weights_from_disk(self, path: str, weight_version: str) -> dict[str, Any]:
        """Load weights in place of the current ones, once the running requests have ended, and flush the
        cache.

        A tensor of another shape ends the server. Raises EndpointUnflushed if the weights were loaded, but
        the cache could not be flushed.
        """
        body = {"model_path": path, "weight_version": weight_version}
        is_unflushed = False
        problem: EndpointError | None = None
        for _ in range(_UPDATES):
            try:
                if is_unflushed:
                    await self.flush_cache(_FLUSH_SECONDS)
                answer = await self._ask("POST", "/update_weights_from_disk", body, _LOAD_SECONDS)
                return _object(answer, "/update_weights_from_disk")
            except EndpointError as error:
                # Its last request has just ended and still counts, or others sample there.
                is_unflushed |= isinstance(error, EndpointRefused) and _NOT_FLUSHED in error.detail
                if not is_unflushed:
                    raise
                problem = error
        assert problem is not None
        raise EndpointUnflushed(problem.message, problem.detail)

    async def pause_generation(self, mode: PauseMode) -> None:
        await self._ask("POST", "/pause_generation", {"mode": mode}, _LOAD_SECONDS)

    async def continue_generation(self) -> None:
        await self._ask("POST", "/continue_generation", {})

    async def flush_cache(self, patience_seconds: float) -> None:
        """Flush the cache once no request runs; raises EndpointBusy after `patience_seconds`."""
        path = f"/flush_cache?timeout={patience_seconds:g}"
        try:
            await self._ask("POST", path, seconds=_QUICK_SECONDS + patience_seconds)
        except EndpointRefused as error:
            raise EndpointBusy(error.message, error.detail) from None

    # --- the wire

    async def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        seconds: float | None = _QUICK_SECONDS,
        most_bytes: int = _PLAIN_BYTES,
    ) -> Any:
        """Send a request and return its answer, within that many seconds and bytes. Raises EndpointError."""
        try:
            async with asyncio.timeout(None if seconds is None else _QUICK_SECONDS + seconds):
                async with self._answered(method, path, body, seconds) as answer:
                    return await self._read(answer, path, most_bytes)
        except TimeoutError as error:
            raise self._died(path, error) from None

    @asynccontextmanager
    async def _answered(
        self, method: str, path: str, body: dict[str, Any] | None, seconds: float | None
    ) -> AsyncIterator[httpx.Response]:
        """Send a request; the body of its answer has not been read yet."""
        timeout = httpx.Timeout(_QUICK_SECONDS, read=seconds)
        try:
            async with self._http.stream(method, path, json=body, timeout=timeout) as answer:
                if answer.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
                    raise EndpointRefused(
                        f"{self.url}{path}: the answer is compressed, which was not asked for"
                    )
                yield answer
        except (httpx.HTTPError, httpx.InvalidURL, orjson.JSONDecodeError) as error:
            raise self._died(path, error) from None

    async def _lines(self, answer: httpx.Response, most_bytes: int) -> AsyncIterator[bytes]:
        """Yield the lines of a body. Raises EndpointRefused for a longer line."""
        line = bytearray()
        async for data in answer.aiter_raw():
            begin = 0
            while (end := data.find(b"\n", begin)) >= 0:
                line += data[begin:end]
                yield bytes(line)
                line.clear()
                begin = end + 1
            line += data[begin:]
            if len(line) > most_bytes:
                raise self._too_long("/generate", most_bytes)
        if line:
            yield bytes(line)

    async def _read(self, answer: httpx.Response, path: str, most_bytes: int) -> Any:
        """Read an answer; None if it is empty. Raises EndpointError."""
        content = bytearray()
        try:
            async for data in answer.aiter_raw():
                if len(content) + len(data) > most_bytes:
                    raise self._too_long(path, most_bytes)
                if not self._answer_bytes.take(len(data)):
                    raise EndpointBusy(f"{self.url}{path}: too many long answers at once")
                content += data
            body = await _parsed(bytes(content))
        finally:
            self._answer_bytes.give_back(len(content))
        status = answer.status_code
        if status == 200 and not (isinstance(body, dict) and body.get("success") is False):
            return None if isinstance(body, bytes) else body
        raise self._refused(path, status, body)

    def _sample_bytes(self, body: dict[str, Any]) -> int:
        """Return how long the answer may be, by the tokens and top log-probs that were requested."""
        prompts = body.get("input_ids") or [0]
        known = sum(map(len, prompts)) if isinstance(prompts[0], list) else len(prompts)
        topk = body.get("top_logprobs_num") or 0
        beside = max(topk) if isinstance(topk, list) else topk
        size = _PLAIN_BYTES + _TOKEN_BYTES * (known + _most_tokens(body)) * (1 + beside)
        return min(self._most_bytes, size)

    def _refused(self, path: str, status: int | str, body: Any) -> EndpointError:
        """Return the exception for an error's status. Its message quotes nothing from a tenant's server."""
        message = f"{self.url}{path} answered {status}"
        detail = f"{message}: {_reason(body)}"
        shown = detail if self.is_operators else message
        if status in (429, 503):
            return EndpointBusy(shown, detail)
        if status in (502, 504):
            return EndpointDied(shown, detail)
        return EndpointRefused(shown, status if isinstance(status, int) else 400, detail)

    def _too_long(self, path: str, most_bytes: int) -> EndpointRefused:
        return EndpointRefused(f"{self.url}{path}: the answer is longer than {most_bytes} bytes")

    def _died(self, path: str, error: Exception) -> EndpointDied:
        kind = EndpointSilent if isinstance(error, (httpx.TimeoutException, TimeoutError)) else EndpointDied
        message = f"{self.url}{path}: {type(error).__name__}"
        detail = f"{message} {error}".rstrip()  # may quote the answer
        return kind(detail if self.is_operators else message, detail)


async def _parsed(content: bytes) -> Any:
    """Parse JSON; return bytes that are not JSON unchanged."""
    try:
        if len(content) > _QUICKLY_PARSED:
            return await asyncio.to_thread(orjson.loads, content)
        return orjson.loads(content) if content else None
    except orjson.JSONDecodeError:
        return content


def _most_tokens(body: dict[str, Any]) -> int:
    """Return how many tokens the requests of the body draw at most, together."""
    params = body["sampling_params"]
    drawn = 0
    for one in params if isinstance(params, list) else [params]:
        limit = one.get("max_new_tokens")
        drawn += (_LONGEST_CONTEXT if limit is None else limit) * one.get("n", 1)
    return drawn


def _object(body: Any, path: str) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise EndpointRefused(f"{path} did not answer with an object")
    return body


def _reason(body: Any) -> str:
    """Return the message of an error, whichever shape it has."""
    if isinstance(body, dict):
        found = body.get("error") or body.get("error_message") or body.get("message") or body
        body = found.get("message", found) if isinstance(found, dict) else found
    if isinstance(body, bytes):
        body = body[:_MESSAGE_CHARACTERS].decode(errors="replace")
    return str(body)[:_MESSAGE_CHARACTERS]


# --- limits

CUT_TOKENS = 2
"""SGLang ends a sequence this many tokens before its context, or its KV cache, is full."""
_MOST_CHARACTERS, _MOST_TARGETS = 1024, 256  # of reported values
_MORE_THAN_INPUT = 6  # tokens that SGLang 0.5.23's context has beyond its `max_req_input_len`
# The fields of config.json that must be equal.
_ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Limits:
    """The limits and features that a server reports.

    `context_length`: tokens of a sequence with its prompt; `max_input`: prompts must be shorter than that.
    None: no limit, or unknown.
    """

    model_path: str
    served_name: str
    context_length: int | None
    max_input: int | None
    max_total_tokens: int | None
    enable_lora: bool
    max_lora_rank: int | None
    max_loaded_loras: int | None
    max_loras_per_batch: int | None
    lora_target_modules: tuple[str, ...] | None
    quantization: str | None
    dtype: str
    tp_size: int
    deterministic: bool
    version: str
    tempered: bool = True  # whether log-probs are of the tempered distribution

    @property
    def longest(self) -> int | None:
        """The tokens of a sequence that the server surely does not cut short."""
        known = [each for each in (self.context_length, self.max_total_tokens) if each is not None]
        return min(known) - CUT_TOKENS if known else None


def limits_of(server_info: dict[str, Any], model_info: dict[str, Any]) -> Limits:
    """Read a server's limits. Raises TypeError or ValueError for answers that are not SGLang's.

    A Tinsmith server reports no number of tokens, and is refused: one that called itself would never end.
    """
    if "max_total_num_tokens" not in server_info:
        raise ValueError("it does not report max_total_num_tokens")
    targets, max_input = server_info.get("lora_target_modules"), _number(server_info, "max_req_input_len")
    return Limits(
        model_path=_text(model_info.get("model_path") or server_info.get("model_path")),
        served_name=_text(server_info.get("served_model_name")),
        context_length=_number(server_info, "context_length") or (max_input and max_input + _MORE_THAN_INPUT),
        max_input=max_input,
        max_total_tokens=_number(server_info, "max_total_num_tokens"),
        enable_lora=bool(server_info.get("enable_lora")),
        max_lora_rank=_number(server_info, "max_lora_rank"),
        max_loaded_loras=_number(server_info, "max_loaded_loras"),
        max_loras_per_batch=_number(server_info, "max_loras_per_batch"),
        lora_target_modules=None if targets is None else tuple(map(_text, targets[:_MOST_TARGETS])),
        quantization=None if server_info.get("quantization") is None else _text(server_info["quantization"]),
        dtype=_text(server_info.get("dtype")),
        tp_size=_number(server_info, "tp_size") or 1,
        deterministic=bool(server_info.get("enable_deterministic_inference")),
        version=_text(server_info.get("version")),
    )


_PROBE_SECONDS = 60.0


async def are_tempered(client: Endpoint) -> bool:
    """Return whether the server's log-probs are of the tempered distribution.

    That is SGLang's default, which its environment may change without a trace. At temperature 0.5,
    differences of log-probs are then twice those at 1. Raises EndpointError.
    """
    spreads = []
    for temperature in (1.0, 0.5):
        params = {"max_new_tokens": 1, "temperature": temperature, "ignore_eos": True}
        body = {"input_ids": [0], "sampling_params": params, "return_logprob": True, "top_logprobs_num": 8}
        try:
            (answer,) = await asyncio.wait_for(client.generate(body), _PROBE_SECONDS)
        except TimeoutError:
            raise EndpointSilent(f"{client.url} did not draw a token") from None
        row = answer["meta_info"]["output_top_logprobs"][0]
        spreads.append(row[0][0] - row[-1][0])
    raw, other = spreads
    return abs(other - 2 * raw) < abs(other - raw)


def _text(value: Any) -> str:
    """Return a value as text, cut to a maximal length."""
    return str(value or "")[:_MOST_CHARACTERS]


def _number(info: dict[str, Any], name: str) -> int | None:
    return None if info.get(name) is None else int(info[name])


def base_model_of(limits: Limits, base_models: Iterable[BaseModel]) -> str | None:
    """Return the base model that the server reports, by folder, hub id or name."""
    names = {limits.model_path, limits.served_name} - {""}
    for model in base_models:
        if names & {model.name, model.hub_id or model.name, str(model.folder)}:
            return model.name
    return None


def mismatch(limits: Limits, model: BaseModel, is_operators: bool) -> str | None:
    """Return why the server cannot sample this base model; None if it can.

    Architectures are compared if an operator's server names a folder of this machine. A tenant's could name
    any folder.
    """
    theirs = _config(Path(limits.model_path)) if is_operators else {}
    ours = _config(model.folder)
    for name in _ARCHITECTURE if theirs else ():
        if name in theirs and name in ours and theirs[name] != ours[name]:
            return f"{name} is {theirs[name]} there and {ours[name]} in {model.name!r}"
    if limits.longest is not None and limits.longest < 2:
        return f"its sequences have at most {limits.longest} tokens"
    return None


def _config(folder: Path) -> dict[str, Any]:
    """Read config.json; empty if there is none."""
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
