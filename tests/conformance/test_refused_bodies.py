"""A body that nobody reads uses up its number, where that can be known: the operations after it run at once.

The server waits two seconds for a number that is missing, and then fails what came after it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import zstandard
from conformance.server_process import PROTOBUF, Wire, datum
from tinker.proto import tinker_public_pb2 as pb

MIB = 1 << 20
TOO_LONG = 9 * MIB  # the server takes 8
JSON = "application/json"
Refused = tuple[str, bytes, dict[str, str], int]


def protobuf(model: str) -> bytes:
    return pb.ForwardBackwardRequest(
        model_id=model, seq_id=1, loss_fn="cross_entropy", data=[datum()]
    ).SerializeToString()


def in_json(model: str, **fields: Any) -> bytes:
    return json.dumps({"model_id": model, "seq_id": 1} | fields).encode()


def number_last(model: str) -> bytes:
    return json.dumps({"data": "a" * TOO_LONG, "model_id": model, "x": None, "seq_id": 1}).encode()


def number_between(model: str, size: int = TOO_LONG) -> bytes:
    """Far from both ends, among texts that look like members and like the ends of objects."""
    texts = {"a": 'x", "seq_id": 7, "{' + "a" * size, "b": ["}]\\", {"seq_id": 8}] * 20_000}
    return json.dumps(texts | {"seq_id": 1, "model_id": model, "c": {"seq_id": 9}} | {"d": texts}).encode()


def zstd(plain: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(plain)


def to(path: str, kind: str, body: bytes, status: int, encoding: str | None = None) -> Refused:
    return (
        path,
        body,
        {"Content-Type": kind} | ({} if encoding is None else {"Content-Encoding": encoding}),
        status,
    )


FORWARD, STEP = "forward_backward", "optim_step"
KINDS: dict[str, Callable[[str], Refused]] = {
    "protobuf over the limit": lambda m: to(FORWARD, PROTOBUF, protobuf(m) + bytes(TOO_LONG), 413),
    "JSON over the limit": lambda m: to(FORWARD, JSON, in_json(m, data="a" * TOO_LONG), 413),
    "JSON over the limit, its number last": lambda m: to(FORWARD, JSON, number_last(m), 413),
    "JSON over the limit, its number in the middle": lambda m: to(FORWARD, JSON, number_between(m), 413),
    "JSON that is cut off behind its number in the middle": lambda m: to(
        FORWARD, JSON, number_between(m, MIB)[:-3], 400
    ),
    "a step of a name that is called session_id": lambda m: to(
        STEP, JSON, json.dumps({"session_id": m, "seq_id": 1, "adam_params": 7}).encode(), 422
    ),
    "a step over the limit": lambda m: to(STEP, JSON, in_json(m, adam_params={}, x="a" * 2 * MIB), 413),
    "a save over the limit": lambda m: to("save_weights", JSON, in_json(m, path="a" * 2 * MIB), 413),
    "zstd over the limit": lambda m: to(FORWARD, PROTOBUF, zstd(protobuf(m) + bytes(300 * MIB)), 413, "zstd"),
    "zstd that is cut off": lambda m: to(
        FORWARD, PROTOBUF, zstd(protobuf(m) + json.dumps([*range(10**5)]).encode())[:-9], 400, "zstd"
    ),
    "gzip, which is not taken": lambda m: to(FORWARD, PROTOBUF, gzip.compress(protobuf(m)), 400, "gzip"),
    "a step in gzip": lambda m: to(STEP, JSON, gzip.compress(in_json(m, adam_params={})), 415, "gzip"),
    "an encoding that does not apply": lambda m: to(FORWARD, PROTOBUF, protobuf(m), 400, "br"),
    "protobuf that is cut off": lambda m: to(FORWARD, PROTOBUF, protobuf(m)[:-3], 400),
    "protobuf by another name": lambda m: to(FORWARD, "application/octet-stream", protobuf(m), 400),
    "JSON that is cut off": lambda m: to(FORWARD, JSON, in_json(m, data=[])[:-3], 400),
    "a large JSON that is cut off": lambda m: to(FORWARD, JSON, in_json(m, data="a" * MIB)[:-3], 400),
    "a step that is cut off": lambda m: to(STEP, JSON, in_json(m, adam_params={})[:-3], 422),
    "a large step that is cut off": lambda m: to(STEP, JSON, in_json(m, x="a" * 300_000)[:-3], 422),
    "a step with more behind it": lambda m: to(STEP, JSON, in_json(m, adam_params={}) + b"}", 422),
    "a step that is not UTF-8": lambda m: to(STEP, JSON, in_json(m, x="?").replace(b"?", b"\xff"), 400),
    "a step with a number of thousands of digits": lambda m: to(
        STEP, JSON, in_json(m, adam_params={"beta1": "?"}).replace(b'"?"', b"9" * 5000), 422
    ),
    "a large step with a number of thousands of digits": lambda m: to(
        STEP, JSON, in_json(m, x="a" * 300_000, y="?").replace(b'"?"', b"9" * 5000), 422
    ),
    "datums with a number of thousands of digits": lambda m: to(
        FORWARD, JSON, in_json(m, data=["?"]).replace(b'"?"', b"9" * 5000), 422
    ),
    "a step that is nested too deeply": lambda m: to(
        STEP, JSON, in_json(m, x="?").replace(b'"?"', b"[" * 50_000 + b"]" * 50_000), 400
    ),
    "a step by another name": lambda m: to(STEP, "application/xml", in_json(m, adam_params={}), 422),
    "a save whose name is a number": lambda m: to("save_weights", JSON, in_json(m, path=7), 422),
    "a large step of the wrong type": lambda m: to(
        STEP, JSON, in_json(m, adam_params=7, x="a" * 300_000), 422
    ),
}


@pytest.fixture
def model(wire: Wire) -> str:
    return wire.model()


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_body_uses_its_number_up(wire: Wire, model: str, kind: str) -> None:
    path, body, headers, status = KINDS[kind](model)
    refused = wire.http.post(f"/api/v1/{path}", content=body, headers=headers)
    assert refused.status_code == status, refused.text
    assert refused.json()["category"] == "user"
    assert "metrics" in wire.result(wire.forward_backward(model, 2))


def test_a_body_over_the_limit_that_does_not_say_so_first(wire: Wire, model: str) -> None:
    """The next operation is there already, and waits for the one with this body."""
    waiting = wire.forward_backward(model, 2)

    def pieces() -> Iterator[bytes]:
        yield protobuf(model)
        for _ in range(TOO_LONG // MIB):
            yield bytes(MIB)

    refused = wire.http.post("/api/v1/forward_backward", content=pieces(), headers={"Content-Type": PROTOBUF})
    assert refused.status_code == 413, refused.text
    assert "metrics" in wire.result(waiting)


def test_a_body_lost_on_its_way_can_be_sent_again(wire: Wire, model: str) -> None:
    """A connection that ends within a body refuses nothing."""

    def breaks_off() -> Iterator[bytes]:
        yield protobuf(model)
        raise httpx.WriteError("the network is gone")

    with pytest.raises(httpx.WriteError):
        wire.http.post("/api/v1/forward_backward", content=breaks_off(), headers={"Content-Type": PROTOBUF})
    assert "metrics" in wire.result(wire.forward_backward(model, 1))


def test_a_number_is_used_up_by_its_own_model_only(wire: Wire, model: str) -> None:
    """Neither a nested `model_id` nor another tenant's model uses it up."""
    nested = json.dumps({"x": {"model_id": model, "seq_id": 1}, "data": "a" * TOO_LONG}).encode()
    assert wire.http.post("/api/v1/forward_backward", content=nested).status_code == 413
    body = in_json(model, data="a" * TOO_LONG)
    theirs = wire.http.post("/api/v1/forward_backward", content=body, headers={"X-API-Key": "tml-bob"})
    assert theirs.status_code == 413
    assert "metrics" in wire.result(wire.forward_backward(model, 1))
