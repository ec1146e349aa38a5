"""The console's files, and the page of the API's documentation: static, without a key, without any data.

Browsers that ask for a page of the console get one HTML file, whose script reads the address. Programs that
ask for the same addresses (without `text/html` in `Accept`) get what the API has there.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from starlette.responses import PlainTextResponse, Response

_FOLDER = Path(__file__).with_name("console")
_PAGES = ("training_runs", "checkpoints", "sessions", "samplers", "playground", "usage")
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}
# Swagger UI's pictures are data: URLs in its style sheet, and React writes style attributes.
_DOCS = {"docs.js", "docs.html", "swagger-ui.css", "swagger-ui-bundle.js"}
_POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; style-src 'self'"
)
_HEADERS = {
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def file_at(path: str, headers: Mapping[bytes, bytes]) -> str | None:
    """Return the name of the console's file at `path`; None for other paths."""
    if path == "/docs":
        return "docs.html"
    folder, _, rest = path.removeprefix("/").partition("/")
    if folder == "console":
        return rest
    is_page = path == "/" or folder in _PAGES
    return "index.html" if is_page and b"text/html" in headers.get(b"accept", b"") else None


def answer(name: str, headers: Mapping[bytes, bytes], needs_key: bool) -> Response:
    """Answer with the console's file of that name, or with 404. Its pages are told if a key is needed."""
    content = _content(name)
    if content is None:
        return PlainTextResponse("the console has no such file\n", 404, headers=_HEADERS)
    if needs_key and name.endswith(".html"):
        content = content.replace(b'data-key="none"', b'data-key="required"', 1)
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    policy = _POLICY + (" 'unsafe-inline'" if name in _DOCS else "")
    sent = _HEADERS | {"ETag": tag, "Content-Security-Policy": policy, "Vary": "Accept"}
    if headers.get(b"if-none-match") == tag.encode():
        return Response(status_code=304, headers=sent)
    return Response(content, headers=sent, media_type=_KINDS[Path(name).suffix])


@cache
def _content(name: str) -> bytes | None:
    """Return the bytes of one of the console's files; None if it has no such file."""
    found = _files().get(name)
    return None if found is None else found.read_bytes()


@cache
def _files() -> dict[str, Path]:
    """Return the console's files by name. Swagger UI's come from the package fastapi-offline."""
    files = {file.name: file for file in _FOLDER.iterdir() if file.suffix in _KINDS}
    offline = importlib.util.find_spec("fastapi_offline")
    if offline is not None and offline.origin is not None:
        static = Path(offline.origin).with_name("static")
        files |= {name: static / name for name in ("swagger-ui.css", "swagger-ui-bundle.js")}
    return files
