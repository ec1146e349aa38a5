"""Which operation of which model a body means, as far as the part of it that was received tells."""

from __future__ import annotations

import io
import json
import re
import zlib
from typing import Any

import zstandard

from . import forward_backward
from .body import numbered

COMPRESSED_HEAD_BYTES = 132 << 10  # a whole block of zstd
_PLAIN_BYTES = 1 << 20
_WINDOW_BYTES = 1 << 27
_MEMBER_BYTES = 512
_MOST_MEMBERS = 50_000  # of these names, at any depth: what is behind them is not looked at
_MEMBER = re.compile(
    rb'"(model_id|session_id|seq_id)"\s*+:\s*+("(?:[^"\\]++|\\.){0,400}+"|-?\d{1,20}+)(?=\s*+[,}])', re.DOTALL
)
_NOT_STRUCTURE = bytes(sorted(set(range(256)) - set(b'"{}[]')))


class JsonNumber:
    """Finds `model_id` and `seq_id` among the members of a JSON object that comes in pieces.

    Strings and nesting are followed through the pieces, without parsing values: a few milliseconds for each
    megabyte. The object may be cut off, or wrong elsewhere.
    """

    def __init__(self) -> None:
        self._members: dict[str, Any] = {}
        self._seen = 0
        self._depth = 0
        self._in_string = False
        self._rest = b""

    def feed(self, piece: bytes) -> None:
        """The next piece."""
        if self._seen > _MOST_MEMBERS:
            return
        text = self._rest + piece
        end = max(0, len(text) - _MEMBER_BYTES)
        while end and text[end - 1] == ord("\\"):  # an escape stays whole
            end -= 1
        self._scan(text, end)

    def found(self, is_complete: bool) -> tuple[Any, Any]:
        """Return model_id and seq_id; None for what is not known. `is_complete`: there are no more pieces."""
        self._scan(self._rest, len(self._rest))
        if is_complete:
            return numbered(self._members)
        return self._members.get("model_id", self._members.get("session_id")), self._members.get("seq_id")

    def _scan(self, text: bytes, end: int) -> None:
        """Take the members that begin before `end`, and keep what is behind it for the next piece."""
        at = 0
        for match in _MEMBER.finditer(text) if b'_id"' in text else ():
            if match.start() >= end:
                break
            self._seen += 1
            self._pass(text[at : match.start()])
            at = match.start()
            if self._depth == 1 and not self._in_string:
                try:
                    self._members[match[1].decode()] = json.loads(match[2])
                except ValueError:  # not UTF-8
                    continue
        self._pass(text[at:end])
        self._rest = text[end:]

    def _pass(self, part: bytes) -> None:
        """Follow strings and nesting through a part of the text."""
        if b"\\" in part:
            part = part.replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = part.translate(None, _NOT_STRUCTURE).split(b'"')
        outside = b"".join(parts[self._in_string :: 2])
        self._in_string ^= len(parts) % 2 == 0
        self._depth += outside.count(b"{") + outside.count(b"[")
        self._depth -= outside.count(b"}") + outside.count(b"]")


def of_head(head: bytes, encoding: str) -> tuple[Any, Any]:
    """Return model_id and seq_id of a body from its first `COMPRESSED_HEAD_BYTES`: of protobuf, whose first
    fields they are, or of what is compressed."""
    plain = _decompressed(head, encoding)
    if not is_json(plain):
        return forward_backward.peek(plain)
    number = JsonNumber()
    number.feed(plain)
    return number.found(is_complete=False)


def is_json(head: bytes) -> bool:
    """Whether a body that begins so can be a JSON object."""
    return head.lstrip()[:1] == b"{"


def _decompressed(head: bytes, encoding: str) -> bytes:
    """The beginning of what is compressed."""
    try:
        if encoding == "zstd":
            decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
            return decompressor.stream_reader(io.BytesIO(head)).read(_PLAIN_BYTES)
        if encoding in ("gzip", "deflate"):
            return zlib.decompressobj(32 + zlib.MAX_WBITS).decompress(head, _PLAIN_BYTES)
    except (zstandard.ZstdError, zlib.error, MemoryError):
        return b""
    return head
