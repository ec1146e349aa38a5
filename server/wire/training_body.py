"""Bodies of forward_backward and forward, of any content type and encoding, as a worker reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from ...engine import messages
from ..errors import ApiError
from . import forward_backward as protobuf
from . import training as json
from .forward_backward import ForwardBackwardBody, decompress

PROTOBUF = "application/x-protobuf"
_DATUMS_AT_ONCE = 512
_datums = msgspec.msgpack.Decoder(list[messages.Datum])


@dataclass(frozen=True)
class ReadBody:
    """`model_id` and `seq_id` are known also of many bodies with an `error`. The datums are encoded, some
    hundreds a piece, so that whoever decodes them can do something else in between."""

    model_id: Any
    seq_id: Any
    error: ApiError | None = None
    body: ForwardBackwardBody | None = None
    pieces: tuple[bytes, ...] = ()


def read(raw: bytes, content_type: str, encoding: str, max_bytes: int, max_datums: int) -> ReadBody:
    model_id, seq_id = None, None
    is_protobuf = content_type.partition(";")[0].strip() == PROTOBUF
    peek: Callable[[bytes], tuple[Any, Any]] = protobuf.peek if is_protobuf else json.peek
    decode = protobuf.decode if is_protobuf else json.decode
    try:
        raw = decompress(raw, encoding, max_bytes)
        model_id, seq_id = peek(raw)
        body = decode(raw, max_datums)
    except ApiError as error:
        return ReadBody(model_id, seq_id, error)
    if is_protobuf:
        seq_id = body.seq_id
    pieces = tuple(
        msgspec.msgpack.encode(body.data[at : at + _DATUMS_AT_ONCE])
        for at in range(0, len(body.data), _DATUMS_AT_ONCE)
    )
    return ReadBody(body.model_id, seq_id, None, replace(body, data=[]), pieces)


async def with_datums(read: ReadBody) -> ForwardBackwardBody:
    """The whole body, unless there is an error; lets others run between the pieces."""
    assert read.body is not None
    data: list[messages.Datum] = []
    for piece in read.pieces:
        data += _datums.decode(piece)
        await asyncio.sleep(0)
    return replace(read.body, data=data)
