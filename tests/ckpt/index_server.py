"""A Python package index on loopback, which can break off, refuse and lie."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

JSON = "application/vnd.pypi.simple.v1+json"


class Index:
    """Lists `files` (by name) at `url`, as JSON or HTML, and serves them.

    `breaks`: how many answers end early, each after `break_after` bytes. `hashes` replace the real ones.
    `password`: of the user `reader`, who alone is answered. `asked`: path and headers of each request.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        *,
        as_json: bool = True,
        ranges: bool = True,
        breaks: int = 0,
        break_after: int = 1000,
        hashes: dict[str, str] | None = None,
        password: str | None = None,
    ):
        self.asked: list[tuple[str, dict[str, str]]] = []
        index, left = self, [breaks]
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        digests |= hashes or {}
        expected = None if password is None else base64.b64encode(f"reader:{password}".encode()).decode()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                path = urlsplit(self.path).path  # a proxy is asked for the whole URL
                index.asked.append((self.path, dict(self.headers)))
                if expected is not None and self.headers.get("Authorization") != f"Basic {expected}":
                    return self._send(401, b"", {})
                folder, _, name = path.strip("/").rpartition("/")
                if folder == "simple" and any(file.startswith(name.replace("-", "_")) for file in files):
                    return self._page()
                if folder == "files" and name in files:
                    return self._file(files[name])
                return self._send(404, b"", {})

            def _page(self) -> None:
                if as_json and JSON in self.headers["Accept"]:
                    listed = [
                        {"filename": name, "url": f"../../files/{name}", "hashes": {"sha256": digest}}
                        for name, digest in digests.items()
                    ]
                    return self._send(200, json.dumps({"files": listed}).encode(), {"Content-Type": JSON})
                links = "\n".join(
                    f'<a href="{name}#sha256={digest}" data-requires-python="&gt;=3.9">{name}</a><br/>'
                    for name, digest in digests.items()
                )
                page = f'<!DOCTYPE html><html><head><base href="/files/"></head><body>{links}</body></html>'
                self._send(200, page.encode(), {"Content-Type": "text/html"})

            def _file(self, content: bytes) -> None:
                begin = int(self.headers.get("Range", "bytes=0-").partition("=")[2].rstrip("-"))
                part = content[begin:] if ranges else content
                code = 206 if ranges and begin else 200
                if left[0]:
                    left[0] -= 1
                    self._send(code, part[:break_after], {}, length=len(part))
                    return self.connection.close()
                self._send(code, part, {})

            def _send(
                self, code: int, content: bytes, headers: dict[str, str], length: int | None = None
            ) -> None:
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content) if length is None else length))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}/simple"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
