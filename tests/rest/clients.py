"""Clients of tinkercloud and of xorl in plain HTTP, which send what those clients send. Every answer that
they get is compared with the OpenAPI document."""

from __future__ import annotations

import time
from typing import Any

import httpx
from rest.documented import Documented

ALICE, BOB = "tml-alice", "tml-bob"
_SECONDS = 120


class Tinkercloud(httpx.Client):
    """`X-API-Key`; polls by path, where 200 is an answer, 408 is none yet and all else is a failure."""

    def __init__(self, url: str, key: str):
        self.documented = Documented()
        hooks = {"response": [self.documented]}
        super().__init__(base_url=url, headers={"X-API-Key": key}, timeout=60, event_hooks=hooks)

    def ask(self, path: str, /, **body: Any) -> dict[str, Any]:
        answer = self.post(f"/api/v1/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def poll(self, request_id: str) -> httpx.Response:
        """The first answer that is not 408."""
        until = time.monotonic() + _SECONDS
        while time.monotonic() < until:
            answer = self.post(f"/api/v1/retrieve_future/{request_id}", json={})
            if answer.status_code != 408:
                return answer
            assert answer.json()["status"] == "pending"
        raise TimeoutError(request_id)

    def done(self, path: str, /, **body: Any) -> dict[str, Any]:
        """The result of a request that is polled."""
        answer = self.poll(self.ask(path, **body)["request_id"])
        assert answer.status_code == 200, answer.text
        return answer.json()


class Xorl(httpx.Client):
    """`Authorization: Bearer`; polls by body, always answered 200."""

    def __init__(self, url: str, key: str):
        self.documented = Documented()
        hooks = {"response": [self.documented]}
        headers = {"Authorization": f"Bearer {key}"}
        super().__init__(base_url=url, headers=headers, timeout=60, event_hooks=hooks)

    def ask(self, path: str, /, **body: Any) -> dict[str, Any]:
        answer = self.post(f"/api/v1/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def poll(self, request_id: str) -> dict[str, Any]:
        """The first answer that is not `try_again`."""
        until = time.monotonic() + _SECONDS
        while time.monotonic() < until:
            answer = self.post("/api/v1/retrieve_future", json={"request_id": request_id})
            assert answer.status_code == 200, answer.text
            if answer.json().get("type") != "try_again":
                return answer.json()
        raise TimeoutError(request_id)

    def done(self, path: str, /, **body: Any) -> dict[str, Any]:
        result = self.poll(self.ask(path, **body)["request_id"])
        assert "error" not in result, result
        return result
