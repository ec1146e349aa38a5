"""A running server, as the commands that are its clients see it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer

OPTION = typer.Option(help="The server [default: TINKER_BASE_URL, or http://127.0.0.1:8000].")


def fail(message: str) -> typer.Exit:
    typer.echo(f"tinsmith: {message}", err=True)
    return typer.Exit(2)


class RemoteServer:
    """Its key is TINKER_API_KEY's. What fails ends the command with the server's reason."""

    def __init__(self, url: str | None):
        import httpx

        self.url = (url or os.environ.get("TINKER_BASE_URL") or "http://127.0.0.1:8000").rstrip("/")
        key = os.environ.get("TINKER_API_KEY")
        headers = {} if key is None else {"X-API-Key": key}
        self._http = httpx.Client(base_url=f"{self.url}/api/v1/", headers=headers, timeout=None)

    def ask(
        self, method: str, path: str, failed: str, /, accepted: tuple[int, ...] = (200,), **request: Any
    ) -> dict[str, Any]:
        """The JSON answer; `failed` says what did not happen, if its status is none of those accepted."""
        import httpx

        try:
            answer = self._http.request(method, path, **request)
            while answer.status_code == 408 and path == "retrieve_future":
                answer = self._http.request(method, path, **request)
        except httpx.HTTPError as error:
            raise fail(f"{self.url} cannot be reached: {error}") from None
        try:
            body = answer.json()
        except ValueError:
            body = {"error": answer.text[:500]}
        if answer.status_code not in accepted or "error" in body:
            reason = body.get("error") if isinstance(body, dict) else body
            raise fail(f"{failed} ({answer.status_code}): {reason}")
        return body

    def run(self, path: str, failed: str, /, **body: Any) -> dict[str, Any]:
        """The answer of an operation."""
        submitted = self.ask("POST", path, failed, json=body)
        return self.ask("POST", "retrieve_future", failed, json={"request_id": submitted["request_id"]})

    def download(self, url: str, file: Path) -> None:
        """A signed URL, without the key."""
        import httpx

        try:
            with httpx.stream("GET", url, timeout=None) as answer, file.open("wb") as written:
                answer.raise_for_status()
                for chunk in answer.iter_bytes():
                    written.write(chunk)
        except httpx.HTTPError as error:
            raise fail(f"{file.name} was not downloaded: {error}") from None
