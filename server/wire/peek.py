"""Which operation of which model a body means, as far as its first and last bytes tell."""

from __future__ import annotations

import io
import json
import re
import zlib
from typing import Any

import zstandard

from . import forward_backward
from .body import DEFAULT_MODEL

HEAD_BYTES = 4 << 10
COMPRESSED_HEAD_BYTES = 132 << 10  # a whole block of zstd
TAIL_BYTES = 1 << 10
_NAMES = ("model_id", "seq_id")
_LAST_MEMBER = re.compile(rb'[,{]\s*"([^"\\]*)"\s*:\s*("[^"\\]*"|-?\d+|true|false|null)\s*$')
_LAST_MEMBERS = 16
_WINDOW_BYTES = 1 << 27


def numbered(head: bytes, tail: bytes, whole: bool, encoding: str) -> tuple[Any, Any]:
    """Return model_id and seq_id; None for what the bytes do not tell.

    `head` is the beginning of the body, `tail` the end behind it. `whole`: there is nothing between the two.
    """
    plain = _decompressed(head, encoding)
    if plain is not head:
        tail, whole = b"", False
    if plain.lstrip()[:1] != b"{":
        return forward_backward.peek(plain)
    found = _last_members((plain + tail)[-TAIL_BYTES:] if whole else tail) | _first_members(plain)
    if whole:
        found.setdefault("model_id", DEFAULT_MODEL)
    return found.get("model_id"), found.get("seq_id")


def _decompressed(head: bytes, encoding: str) -> bytes:
    """The beginning of what is compressed."""
    try:
        if encoding == "zstd":
            decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
            return decompressor.stream_reader(io.BytesIO(head)).read(HEAD_BYTES)
        if encoding in ("gzip", "deflate"):
            return zlib.decompressobj(32 + zlib.MAX_WBITS).decompress(head, HEAD_BYTES)
    except (zstandard.ZstdError, zlib.error, MemoryError):
        return b""
    return head


def _first_members(head: bytes) -> dict[str, Any]:
    """Those of a JSON object that are whole within its beginning."""
    text, found = head.decode(errors="replace"), {}
    decoder = json.JSONDecoder()
    at = text.find("{")
    try:
        while text[at] in "{,":
            key, at = decoder.raw_decode(text, _behind_spaces(text, at + 1))
            at = _behind_spaces(text, at)
            if not isinstance(key, str) or text[at] != ":":
                break
            value, at = decoder.raw_decode(text, _behind_spaces(text, at + 1))
            at = _behind_spaces(text, at)
            text[at]  # raises at the end, where a number may go on
            if key in _NAMES:
                found[key] = value
    except (ValueError, IndexError, RecursionError):
        pass
    return found


def _behind_spaces(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


def _last_members(tail: bytes) -> dict[str, Any]:
    """The scalar ones at the very end of a JSON object."""
    tail = tail.rstrip()
    if not tail.endswith(b"}"):
        return {}
    tail, found = tail[:-1], {}
    for _ in range(_LAST_MEMBERS):
        member = _LAST_MEMBER.search(tail)
        if member is None:
            break
        key = member[1].decode(errors="replace")
        if key in _NAMES:
            try:
                found.setdefault(key, json.loads(member[2]))
            except ValueError:  # not UTF-8
                break
        tail = tail[: member.start()]
    return found
