"""The gate: what every connection and every request passes before it reaches the application.

`Gate`, the ASGI middleware, gives the request an id, checks who sent it before its body is read, bounds its
body, and turns exceptions into answers. A request that breaks no rule passes `Gate.__call__`, `receive` and
`send`.

`Connection` bounds slow clients. A client that sends half a request, or does not read its answer, holds a
descriptor and memory. So the head of a request has `stall_seconds` from its first byte (or the connection's
beginning), and a body or an answer must move within every `stall_seconds`. Between two requests uvicorn's
`timeout_keep_alive` applies; operations may take as long as they need.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import math
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn._types import HTTPScope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ...engine import logs
from ..access import ANYBODY, SIGNATURE, ApiKeys, Caller, Tokens, UrlSigner
from ..errors import ApiError, BadRequest, InvalidToken, TooLarge, Unauthorized
from ..models.submits import Admission
from ..operations.operation import TRACE_PARENT
from ..settings import Settings
from ..wire.training import COMPRESSED_HEAD_BYTES
from . import console_pages
from .bodies import FINAL, NUMBERED_PATHS, SMALL_BYTES, TAKEN_FOR_JSON, BodyLimits, OperationNumber, as_json
from .browser_checks import BrowserChecks
from .dependencies import Services
from .errors import unhandled
from .monitoring import Metrics
from .openapi import OPEN_PATHS

log = logging.getLogger("tinsmith.requests")

METRICS_PATH = "/metrics"
MAX_HEADERS = 256
MAX_HEAD_BYTES = 256 << 10
_HEAD_TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n"
_GIVEN_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_READ_BYTES = 1 << 30
_READ_SECONDS = 1.0

Headers = dict[bytes, bytes]
"""A request's headers by lower-case name; of several of one name, the first."""


class Gate:
    """The one ASGI middleware, which checks requests and finishes their answers.

    - Gives each request an id, for its answer's `X-Request-Id` and for what is logged meanwhile. A proxy or a
      client may send the id.
    - Without keys, refuses what other sites' web pages may have sent (`browser_checks.py`).
    - Answers requests for the console's files, whose pages know whether a key is needed (`console_pages.py`).
    - Answers 401 to unknown callers and 429 to an owner that sends too many requests; puts the `caller` and
      its `owner` into the request's state.
    - Answers 413 to bodies over their path's limit. Bodies over `SMALL_BYTES` wait for their share of the
      budget, unless they are written to disk as they arrive.
    - Uses up the number of an operation whose body is refused, so that those after it need not wait for it.
      Routes that have read a body do that themselves (`models/submits.py`); the gate does it for bodies that
      no route has read.
    - Marks bodies as JSON if they have no content type, or that of `curl -d`.
    - Times requests by route. Long polls last as long as the work that they wait for.
    - Answers exceptions that nothing inside has handled with an error id. Starlette's own way is to answer
      and then to raise the exception again, upon which uvicorn closes the connection; a client that has sent
      its next request on it by then gets a reset. An answer that has begun cannot be mended: its connection
      is closed, so that the client sees that it is cut.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        tokens: Tokens,
        signer: UrlSigner,
        browsers: BrowserChecks,
        admission: Admission,
        limits: BodyLimits,
        services: Services,
        metrics: Metrics,
        scrape_token: SecretStr | None = None,
    ):
        """`scrape_token`: the only token that opens `/metrics`; None: every key does."""
        self._app = app
        self._keys = keys
        self._tokens = tokens
        self._signer = signer
        self._browsers = browsers
        self._admission = admission
        self._limits = limits
        self._services = services
        self._request_seconds = metrics.request_seconds
        self._scrape_token = scrape_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: Headers = dict(reversed(scope["headers"]))
        given = headers.get(b"x-request-id", b"")
        request_id = given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        if parent := headers.get(b"traceparent"):
            TRACE_PARENT.set(parent.decode("latin-1"))
        exchange = Exchange(receive, send, request_id)
        began, has_entered = time.perf_counter(), False
        error: BaseException | None = None
        with logs.ids(request_id=request_id.decode()):
            try:
                app = self._admit(scope, headers, exchange)
                has_entered = app is self._app
                if exchange.size <= SMALL_BYTES or scope["path"] in self._limits.streamed:
                    await app(scope, exchange.receive, exchange.send)
                else:
                    state = scope.setdefault("state", {})
                    room = self._limits.budget.take(state.get("owner", ""), exchange.size)
                    async with room as state["body_is_read"]:
                        await app(scope, exchange.receive, exchange.send)
            except (Exception, asyncio.CancelledError) as raised:
                error = raised
            try:
                if error is not None or exchange.is_over:
                    await _answer_error(scope, exchange, error)
            finally:
                seconds, status = time.perf_counter() - began, exchange.status or 500
                if has_entered:
                    route = getattr(scope.get("route"), "path", "none")
                    self._request_seconds.labels(route, str(status)).observe(seconds)
                if log.isEnabledFor(level := logging.WARNING if status >= 500 else logging.DEBUG):
                    log.log(level, "%s %s: %d in %.3f s", scope["method"], scope["path"], status, seconds)

    def _admit(self, scope: Scope, headers: Headers, exchange: Exchange) -> ASGIApp:
        """Return what answers the request: the application, or a page of the console.

        Raises ApiError for a request that is refused before its body is read.
        """
        path = scope["path"]
        if len(scope["headers"]) > MAX_HEADERS:
            raise BadRequest(f"the request has over {MAX_HEADERS} headers")
        if not self._keys.required:
            self._browsers.check(scope)
        if scope["method"] in ("GET", "HEAD"):
            page = console_pages.file_at(path, headers)
            if page is not None:
                return console_pages.answer(page, headers, self._keys.required)
        state, key = scope.setdefault("state", {}), _sent_key(headers)
        known = self._keys.callers.get(hashlib.sha256(key.encode()).digest()) if key else None
        if path in OPEN_PATHS:
            with contextlib.suppress(ApiError):  # with a key the answer has more
                state["owner"] = (known or self._other_caller(scope, key)).owner
        elif path == METRICS_PATH and self._scrape_token is not None:
            self._require_scrape_token(key or "")
        else:
            caller = known or self._other_caller(scope, key)
            self._admission.request(caller.owner)
            state["caller"], state["owner"] = caller, caller.owner
            logs.add_ids(tenant=caller.owner)
            if path in NUMBERED_PATHS:
                encoding = headers.get(b"content-encoding", b"").strip().lower().decode("latin-1")
                exchange.number = OperationNumber(self._services, caller.owner, encoding)
        limit = exchange.limit = self._limits.own.get(path, self._limits.usual)
        declared = headers.get(b"content-length", b"0")
        # At most 18 digits: int() takes no more than 4300 of them.
        if not declared.isdigit() or len(declared) > 18 or int(declared) > limit:
            raise TooLarge(f"the body is over the limit of {limit} bytes")
        exchange.size = int(declared) or (limit if b"transfer-encoding" in headers else 0)
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() in TAKEN_FOR_JSON:
            as_json(scope)
        return self._app

    def _other_caller(self, scope: Scope, key: str | None) -> Caller:
        """Return who sent a request without one of the server's keys: by a token, or by the signature of its
        URL. Raises Unauthorized, or Forbidden."""
        if key is None and f"{SIGNATURE}=".encode() in scope["query_string"]:
            query = scope["query_string"].decode("latin-1")
            return Caller(self._signer.tenant_of(scope["method"], scope["path"], query), None)
        if not self._keys.required:
            return ANYBODY
        if key is None:
            raise Unauthorized("missing API key: send it as X-API-Key (TINKER_API_KEY for the SDK)")
        if not key.startswith("eyJ"):  # as the header of every JSON Web Token
            raise Unauthorized("invalid API key: this server does not know it")
        claims = self._tokens.claims(key)
        if claims is None:
            raise InvalidToken("invalid token: it has expired, or this server did not make it")
        known = self._keys.with_id(claims.key_id)
        if known is None or known.owner != claims.owner:
            raise InvalidToken("invalid token: the key that it was made for is not valid any more")
        return Caller(known.owner, known, key)

    def _require_scrape_token(self, sent: str) -> None:
        assert self._scrape_token is not None
        if not hmac.compare_digest(sent.encode(), self._scrape_token.get_secret_value().encode()):
            raise Unauthorized("/metrics takes the token of --metrics-token alone, as a bearer token")


@dataclass(eq=False)
class Exchange:
    """One request and its answer, as they pass the gate.

    `size`: bytes that its body may have. `is_over`: the body is longer than its `limit`. `status`: of the
    answer; 0 before it has begun.
    """

    _receive: Receive
    _send: Send
    _request_id: bytes
    size: int = 0
    limit: float = math.inf
    number: OperationNumber | None = None
    is_over: bool = False
    status: int = 0
    has_begun: bool = False
    is_answered: bool = False
    _seen: int = 0  # bytes
    _has_ended: bool = False  # there is nothing more to receive
    _held: Message | None = None  # the start of a refusal

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request":
            self._has_ended = True
            return message
        body = message.get("body", b"")
        self._seen += len(body)
        self._has_ended = not message.get("more_body", False)
        if (number := self.number) is not None:
            number.is_complete = self._has_ended
            if self._seen <= COMPRESSED_HEAD_BYTES:
                number.head += body
            else:
                number.note(body)
        if self._seen > self.limit:
            self.is_over = True
            return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        if self.is_over:  # the application answers a body that was cut
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self._request_id)]
            if self.number is not None and self.status in FINAL:
                self._held = message
                return
        elif self._held is not None:
            start, self._held = self._held, None
            await self._use_up_number(message)
            await self._send(start)
        self.has_begun = True
        self.is_answered = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def _use_up_number(self, answer: Message) -> None:
        """Mark the `seq_id` in a refused body as used, before the refusal is sent."""
        assert self.number is not None
        self.limit = math.inf
        with contextlib.suppress(TimeoutError):  # the number may be in the rest, unless the client waits
            while not self._has_ended and self._seen < _READ_BYTES:
                await asyncio.wait_for(self.receive(), _READ_SECONDS)
        if self.number.is_complete or self.status == TooLarge.status:
            await self.number.use_up(answer.get("body", b""))


async def _answer_error(scope: Scope, exchange: Exchange, error: BaseException | None) -> None:
    """Send the error for an exception, or for a body over its limit.

    Raises the exception if the answer has already begun, or if the server is stopping.
    """
    if isinstance(error, asyncio.CancelledError) and (task := asyncio.current_task()) and task.cancelling():
        raise error
    if exchange.is_over:
        error = TooLarge(f"the body is over the limit of {exchange.limit} bytes")
        exchange.is_over, exchange.limit = False, math.inf
    assert error is not None
    if exchange.has_begun and not exchange.is_answered:
        raise error
    answer = unhandled(scope, error)
    if not exchange.has_begun:
        await answer(scope, exchange.receive, exchange.send)


def _sent_key(headers: Headers) -> str | None:
    """Return the key or token that a request was sent with, or None. An empty header counts as none."""
    key = headers.get(b"x-api-key", b"").strip()
    if not key:
        scheme, _, credentials = headers.get(b"authorization", b"").strip().partition(b" ")
        key = credentials.strip() if scheme.lower() == b"bearer" else b""
    return key.decode("latin-1") or None


class Connection(HttpToolsProtocol):
    """One connection of uvicorn, with limits for slow clients."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._stall_seconds: float = self.config.app.state.services[Settings].stall_seconds  # type: ignore[union-attr]
        self._request: asyncio.TimerHandle | None = None  # runs while a request is incomplete
        self._answer: asyncio.TimerHandle | None = None  # runs while an answer is not read
        self._received: HTTPScope | None = None  # the last request that has arrived as a whole
        self._has_moved = False
        self._unread = 0
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._request, self._answer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # --- requests

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._has_moved = True
        if self.scope is self._received:  # no other request has begun
            return
        if self._request is None:
            self._await_request()
        if not self._is_in_body():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
                self.transport.write(_HEAD_TOO_LONG)
                self.transport.close()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._received, self._head_bytes = self.scope, 0
        if self._request is not None:
            self._request.cancel()
            self._request = None

    def _is_in_body(self) -> bool:
        """Return whether the head of the request that arrives is complete."""
        return self.cycle is not None and self.cycle.scope is self.scope

    def _await_request(self) -> None:
        self._request = self.loop.call_later(self._stall_seconds, self._look_at_request)

    def _look_at_request(self) -> None:
        # Nothing moves either while the application has not read what was received.
        if self._is_in_body() and (self._has_moved or self.flow.read_paused):
            self._has_moved = False
            self._await_request()
        else:
            self.transport.abort()

    # --- answers

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answer is not None:
            self._answer.cancel()
            self._answer = None

    def _await_reader(self) -> None:
        self._unread = self.transport.get_write_buffer_size()
        self._answer = self.loop.call_later(self._stall_seconds, self._look_at_answer)

    def _look_at_answer(self) -> None:
        if self.transport.get_write_buffer_size() < self._unread:
            self._await_reader()
        else:
            self.transport.abort()
