"""A Hugging Face hub of one's own on loopback: repositories as folders, each revision one folder."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """`asked`: the files that were requested, in order. `revisions`: (repository, revision) -> folder."""

    def __init__(self, revisions: dict[tuple[str, str], Path]):
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, body: bool) -> None:
                parts = unquote(urlsplit(self.path).path).strip("/").split("/")
                api = parts[:2] == ["api", "models"]
                if len(parts) < (6 if api else 4):
                    return self._send(404, b"{}", {})
                repository, kind, revision, file = (
                    (f"{parts[2]}/{parts[3]}", parts[4], parts[5], "")
                    if api
                    else ("/".join(parts[:2]), parts[2], parts[3], "/".join(parts[4:]))
                )
                found = {commit(*key): folder for key, folder in revisions.items()} | {
                    key[1]: folder for key, folder in revisions.items() if key[0] == repository
                }
                folder = found.get(revision)
                if folder is None:
                    return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                sha = next(commit(*key) for key, each in revisions.items() if each == folder)
                names = sorted(each.name for each in folder.iterdir())
                if kind == "revision":
                    siblings = [{"rfilename": name} for name in names]
                    return self._json({"id": repository, "sha": sha, "siblings": siblings})
                if kind == "tree":
                    return self._json(
                        [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]
                    )
                if body:
                    hub.asked.append(file)
                if file not in names:
                    return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
                content = (folder / file).read_bytes()
                etag = hashlib.sha256(content).hexdigest()
                self._send(200, content, {"X-Repo-Commit": sha, "ETag": f'"{etag}"'}, body)

            def _json(self, content: object) -> None:
                self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

            def _send(self, code: int, content: bytes, headers: dict[str, str], body: bool = True) -> None:
                self.send_response(code)
                for name, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def commit(repository: str, revision: str) -> str:
    return hashlib.sha1(f"{repository} {revision}".encode()).hexdigest()
