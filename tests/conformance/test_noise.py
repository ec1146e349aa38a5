"""Every route, with bodies that nobody would send: an answer below 500, and a server that still works."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
from conformance.server_process import ServerProcess, Wire, datum

VALUES = [
    *(
        None,
        True,
        0,
        1,
        -1,
        1 << 31,
        1 << 63,
        10**30,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "a",
        "\x00",
        "ü" * 300,
    ),
    *("../../x", "tinker://a/weights/b", "\ud800", [], [1], [[]], {}, {"a": {}}, {"type": "adamw"}),
]
FIELDS = [
    *("session_id", "model_id", "seq_id", "model_seq_id", "base_model", "lora_config", "optimizer_config"),
    *("adam_params", "path", "name", "kind", "ttl_seconds", "overwrite", "user_metadata", "optimizer"),
    *("sampling_session_id", "sampling_session_seq_id", "model_path", "prompt", "num_samples", "request_id"),
    *("sampling_params", "tinker_path", "reason", "detail", "tags", "display_name", "events"),
]


@pytest.fixture(scope="module")
def routes(server: ServerProcess) -> list[tuple[str, str]]:
    from conformance.conftest import ALICE

    paths = Wire(server.url, ALICE).http.get("/openapi.json").json()["paths"]
    return sorted((method, path) for path, methods in paths.items() for method in methods)


def test_no_route_breaks(wire: Wire, routes: list[tuple[str, str]]) -> None:
    random.seed(5)
    model, session = wire.model(), wire.session()
    known = {"model_id": model, "session_id": session, "base_model": "tiny"}
    assert len(routes) > 25
    for (method, path), attempt in itertools.product(routes, range(12)):
        url = path.replace("{session_id}", session).replace("{run_id}", model)
        for part in ("{sampler_id}", "{segment}", "{name}"):
            url = url.replace(part, random.choice(["weights", "a", "%00", "..%2f..", "x" * 300]))
        body = {field: random.choice(VALUES) for field in random.sample(FIELDS, random.randint(0, 12))}
        if attempt % 2:
            body |= known
        if path.endswith("/finish"):
            url = url.replace(session, "nobody")
        content = body if attempt % 4 else random.choice([[], None, 1, "x", [[[[]]]]])
        answer = wire.http.request(
            method.upper(),
            url,
            content=to_json(content),
            headers={"Content-Type": "application/json"},
            timeout=60,
        )
        assert answer.status_code < 500, (method, url, content, answer.text)
        if answer.status_code >= 400:
            assert {"detail", "error", "category", "status_code", "path"} <= answer.json().keys()
    # Whatever those did to the model's numbers, a fresh one works.
    assert "metrics" in wire.result(wire.forward_backward(wire.model(), 1))


def test_deep_json(wire: Wire) -> None:
    deep = b'{"user_metadata":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001
    for path in ("create_session", "optim_step", "asample"):
        answer = wire.http.post(f"/api/v1/{path}", content=deep, headers={"Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500
    assert wire.http.get("/api/v1/healthz").status_code == 200


def test_damaged_protobuf(wire: Wire) -> None:
    from tinker.proto import tinker_public_pb2 as pb

    generator = np.random.default_rng(3)
    model = wire.model()
    request = pb.ForwardBackwardRequest(model_id=model, seq_id=1, loss_fn="cross_entropy", data=[datum()] * 2)
    whole = np.frombuffer(request.SerializeToString(), np.uint8)
    for _ in range(150):
        body = whole.copy()
        body[generator.integers(0, len(body), 3)] = generator.integers(0, 256, 3)
        cut = generator.integers(len(body) // 2, len(body) + 1)
        assert wire.post_protobuf(body[:cut].tobytes()).status_code < 500
    assert "metrics" in wire.result(wire.forward_backward(wire.model(), 1))


def to_json(value: object) -> bytes:
    """Write JSON with NaN, Infinity and lone surrogates, as careless encoders do."""

    return json.dumps(value).encode()
