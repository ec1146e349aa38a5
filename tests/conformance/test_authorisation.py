"""Every route, asked without a key, with a wrong one, for another tenant's things, and for one's own.

The table below is compared with the application's routes: one that is added there is added here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
from conformance import adapters
from conformance.conftest import ALICE, BOB
from conformance.server_process import PROTOBUF, ServerProcess, Wire, datum
from tinker.proto import tinker_public_pb2 as pb
from tinsmith.server.app import create_app
from tinsmith.server.settings import Settings


@dataclass(frozen=True)
class Things:
    """The ids of what a tenant has."""

    session: str
    model: str
    sampler: str
    request: str
    saved: str  # training state's URI
    exported: str  # sampler weights' URI

    def url(self, path: str) -> str:
        run, segment, name = self.exported.removeprefix("tinker://").split("/")
        ids = {"session_id": self.session, "run_id": run, "segment": segment, "name": name}
        path = path.replace("{file:path}", "adapter_config.json").replace("{request_id}", self.request)
        path = path.replace("{name:path}", self.exported)
        return path.format(**ids, sampler_id=self.sampler)


NOBODYS = Things(
    session="0" * 32,
    model="0" * 32 + ":train:0",
    sampler="0" * 32 + ":sample:0",
    request="req_" + "0" * 32,
    saved=f"tinker://{'0' * 32}:train:0/weights/none",
    exported=f"tinker://{'0' * 32}:train:0/sampler_weights/none",
)

Request = dict[str, Any]  # of httpx.Client.request
numbers = itertools.count(100)  # of models and samplers; no two the same
steps = itertools.count(3)  # of the model of alice, after two saves


def json(**body: Any) -> Request:
    return {"json": body}


def gradients(things: Things) -> Request:
    body = pb.ForwardBackwardRequest(
        model_id=things.model, seq_id=next(steps), loss_fn="cross_entropy", data=[datum()]
    )
    return {"content": body.SerializeToString(), "headers": {"Content-Type": PROTOBUF}}


def sample(**of: Any) -> Request:
    return json(prompt={"tokens": [5, 6]}, sampling_params={"max_tokens": 2, "stop": []}, **of)


# Anybody, without a key: probes.
OPEN = {("GET", path) for path in ("/healthz", "/api/v1/healthz", "/health", "/api/v1/health")}

# What old clients of xorl ask, and is no more.
GONE = {
    "/connect_inference_endpoint",
    "/disconnect_inference_endpoint",
    "/api/v1/save_full_weights_safetensors",
    "/api/v1/update_dedicated_endpoint",
    "/api/v1/update_serverless_weights",
}

# Anybody with a key: nothing of any tenant is in it, or only the caller's own.
KEYED: dict[tuple[str, str], Request] = {
    ("POST", "/api/v1/import_weights"): {
        "params": {"base_model": "tiny"},
        "content": adapters.tarred(adapters.lm_head(hidden_size=32)),
    },
    ("GET", "/openapi.json"): {},
    ("GET", "/metrics"): {},
    ("POST", "/api/v1/client/config"): json(),
    ("POST", "/api/v1/client/dynamic_config"): json(),
    ("POST", "/add_inference_endpoint"): json(host="10.0.0.2", port=30000),
    ("GET", "/list_inference_endpoints"): {},
    ("POST", "/remove_inference_endpoint"): json(host="10.0.0.2", port=30000),
    ("POST", "/sync_inference_weights"): json(),
    ("POST", "/api/v1/set_sync_quantization"): json(),
    **{("POST", path): json() for path in sorted(GONE)},
    ("GET", "/api/v1/get_server_capabilities"): {},
    ("GET", "/api/v1/capabilities"): {},
    ("GET", "/"): {},
    ("POST", "/api/v1/telemetry"): json(events=[]),
    ("POST", "/api/v1/create_session"): json(tags=[]),
    ("GET", "/v1/models"): {},
    ("GET", "/model_info"): {},
    ("GET", "/get_model_info"): {},
    ("GET", "/server_info"): {},
    ("GET", "/get_server_info"): {},
    ("POST", "/sleep"): json(),
    ("POST", "/wake_up"): json(),
    ("GET", "/api/v1/sessions"): {},
    ("POST", "/api/v1/sessions/search"): json(),
    ("GET", "/api/v1/session_info"): {},
    ("POST", "/api/v1/cleanup_futures"): json(),
    ("POST", "/api/v1/list_checkpoints"): json(model_id="none"),
    ("GET", "/api/v1/training_runs"): {},
    ("GET", "/api/v1/console/overview"): {},
    ("GET", "/api/v1/console/events"): {"params": {"looks": 1}},
    ("GET", "/api/v1/console/runs"): {},
    ("GET", "/api/v1/console/sessions"): {},
    ("GET", "/api/v1/console/samplers"): {},
    ("GET", "/api/v1/console/usage"): {},
    ("GET", "/api/v1/checkpoints"): {},
    ("GET", "/api/v1/audit"): {},
    ("GET", "/api/v1/billing/usage/events"): {
        "params": {"starting_on": "2026-01-01T00:00:00Z", "ending_before": "2026-01-02T00:00:00Z"}
    },
    ("GET", "/api/v1/billing/usage/checkpoints/current"): {},
    ("POST", "/api/v1/auth/token"): json(),
    ("GET", "/api/v1/auth/apikey/me"): {},
    ("DELETE", "/api/v1/auth/apikey/me"): {},
}
# Keys that were given to the server at its start are not revoked over HTTP, not even by their owners; and an
# engine that has others' models does not sleep.
REFUSED = {("DELETE", "/api/v1/auth/apikey/me"), ("POST", "/sleep")}

_ONE = "/api/v1/training_runs/{run_id}/checkpoints/{segment}/{name}"

HELLO = [{"role": "user", "content": "Hello"}]

# A custom loss: the sum of the log-probs.
TOTAL = {
    "name": "total",
    "inputs": [{"name": "logprobs", "rank": 1}],
    "graph": {
        "format": 1,
        "nodes": [
            {"op": "placeholder", "name": "x", "target": "logprobs"},
            {"op": "call_method", "name": "y", "target": "sum", "args": [{"ref": "x"}]},
            {"op": "output", "name": "z", "target": "output", "args": [[{"ref": "y"}, {"dict": {}}]]},
        ],
    },
}

# Only the owner of what the request names; several ways to name it. What destroys comes last.
OWNED: list[tuple[str, str, Callable[[Things], Request]]] = [
    ("POST", "/api/v1/session_heartbeat", lambda of: json(session_id=of.session)),
    ("GET", "/api/v1/sessions/{session_id}", lambda of: {}),
    ("PUT", "/api/v1/sessions/{session_id}/project", lambda of: json(project_id="theirs")),
    ("GET", "/api/v1/sessions/{session_id}/trace_export", lambda of: {}),
    ("GET", "/api/v1/sessions/{session_id}/trace", lambda of: {}),
    (
        "POST",
        "/api/v1/create_model",
        lambda of: json(
            session_id=of.session, model_seq_id=next(numbers), base_model="tiny", lora_config={"rank": 4}
        ),
    ),
    ("POST", "/api/v1/get_info", lambda of: json(model_id=of.model)),
    ("GET", "/api/v1/get_tokenizer", lambda of: {"params": {"model_id": of.model}}),
    ("POST", "/api/v1/stop_rlve", lambda of: json(model_id=of.model)),
    ("POST", "/api/v1/resume_rlve", lambda of: json(model_id=of.model)),
    (
        "POST",
        "/api/v1/create_custom_loss",
        lambda of: json(session_id=of.session, custom_loss_seq_id=next(numbers), **TOTAL),
    ),
    ("POST", "/api/v1/forward_backward", gradients),
    ("POST", "/api/v1/forward", gradients),
    (
        "POST",
        "/api/v1/optim_step",
        lambda of: json(model_id=of.model, seq_id=next(steps), adam_params={}),
    ),
    (
        "POST",
        "/api/v1/abort_gradient_epoch",
        lambda of: json(model_id=of.model, seq_id=next(steps)),
    ),
    ("POST", "/api/v1/save_weights", lambda of: json(model_id=of.model, seq_id=next(steps), path="again")),
    (
        "POST",
        "/api/v1/save_weights_for_sampler",
        lambda of: json(model_id=of.model, seq_id=next(steps), path="again"),
    ),
    (
        "POST",
        "/api/v1/save_weights_external",
        lambda of: json(model_id=of.model, seq_id=next(steps), path="again"),
    ),
    (
        "POST",
        "/api/v1/load_weights",
        lambda of: json(model_id=of.model, seq_id=next(steps), path=of.saved),
    ),
    (
        "POST",
        "/api/v1/load_weights",
        lambda of: json(session_id=of.session, model_seq_id=next(numbers), path=of.saved),
    ),
    ("POST", "/api/v1/weights_info", lambda of: json(tinker_path=of.saved)),
    ("GET", "/api/v1/training_runs/{run_id}", lambda of: {}),
    ("GET", "/api/v1/training_runs/{run_id}/checkpoints", lambda of: {}),
    ("GET", "/api/v1/training_runs/{run_id}/metrics", lambda of: {}),
    ("POST", "/api/v1/training_runs/{run_id}/metrics", lambda of: json(step=1, metrics={"reward": 1.0})),
    ("GET", "/api/v1/console/download", lambda of: {"params": {"path": of.exported}}),
    (
        "POST",
        "/api/v1/create_sampling_session",
        lambda of: json(session_id=of.session, sampling_session_seq_id=next(numbers), model_path=of.exported),
    ),
    ("GET", "/api/v1/samplers/{sampler_id}", lambda of: {}),
    ("POST", "/api/v1/join_sampling_session", lambda of: json(sampling_session_id=of.sampler)),
    (
        "POST",
        "/api/v1/copy_weights",
        lambda of: json(source_path=of.saved, destination_project_id="archive"),
    ),
    (
        "POST",
        "/api/v1/copy_weights",
        lambda of: json(source_path=of.saved, session_id=of.session, model_seq_id=next(numbers)),
    ),
    ("POST", "/api/v1/create_sampling_session", lambda of: json(model_path=of.exported)),
    ("POST", "/api/v1/create_sampling_client", lambda of: json(model_path=of.exported)),
    ("POST", "/api/v1/sample", lambda of: sample(sampling_session_id=of.sampler)),
    ("POST", "/api/v1/sample", lambda of: sample(model_id=of.model)),
    ("POST", "/api/v1/asample", lambda of: sample(model_id=of.model)),
    ("POST", "/api/v1/sync_inference_weights", lambda of: json(model_id=of.model)),
    ("POST", "/api/v1/asample", lambda of: sample(sampling_session_id=of.sampler)),
    ("POST", "/api/v1/asample", lambda of: sample(model_path=of.exported)),
    ("POST", "/generate", lambda of: json(input_ids=[5, 6], lora_path=of.exported)),
    ("POST", "/generate", lambda of: json(input_ids=[5, 6], model=of.sampler)),
    ("GET", "/v1/models/{name:path}", lambda of: {}),
    ("POST", "/v1/completions", lambda of: json(prompt=[5, 6], max_tokens=1, model=of.exported)),
    ("POST", "/v1/chat/completions", lambda of: json(messages=HELLO, max_tokens=1, model=of.exported)),
    ("POST", "/api/v1/retrieve_future", lambda of: json(request_id=of.request)),
    ("POST", "/api/v1/retrieve_future/{request_id}", lambda of: {}),
    (
        "POST",
        "/api/v1/retrieve_futures",
        lambda of: json(target={"sampling_session_id": of.sampler}, timeout=0),
    ),
    ("POST", "/api/v1/cancel_future", lambda of: json(request_id=of.request)),
    ("GET", _ONE + "/archive", lambda of: {}),
    ("GET", _ONE + "/archive.tar", lambda of: {}),
    ("GET", _ONE + "/external_weights_urls", lambda of: {}),
    ("GET", _ONE + "/files/{file:path}", lambda of: {}),
    ("PUT", _ONE + "/ttl", lambda of: json(ttl_seconds=3600)),
    ("POST", _ONE + "/publish", lambda of: {}),
    ("DELETE", _ONE + "/publish", lambda of: {}),
    ("DELETE", _ONE, lambda of: {}),
    (
        "POST",
        "/api/v1/delete_checkpoint",
        lambda of: json(
            checkpoint_id=of.saved.removeprefix("tinker://").partition("/")[2], model_id=of.model
        ),
    ),
    ("POST", "/api/v1/kill_session", lambda of: json(model_id=of.model, save_checkpoint=False)),
    ("POST", "/api/v1/delete_model", lambda of: json(model_id=of.model)),
    ("POST", "/api/v1/unload_model", lambda of: json(model_id=of.model)),
    ("POST", "/api/v1/sessions/{session_id}/finish", lambda of: json(reason={"type": "success"})),
]
# Of models that the server trains, which alice's is not.
UNTRAINED = {"/api/v1/stop_rlve", "/api/v1/resume_rlve"}
# Ends a model, which another of these routes may have ended.
ENDING = {"/api/v1/delete_model", "/api/v1/unload_model"}
# Says the same to everybody, and does something only to what is the caller's.
SILENT = {"/api/v1/cancel_future"}


def routes(of: Any) -> Iterator[tuple[str, str]]:
    """Return the routes of an application, whatever routers they came with."""
    for route in of.routes:
        if hasattr(route, "path"):
            yield from ((method, route.path) for method in route.methods - {"HEAD"})
        else:
            yield from routes(route.original_router)


def test_every_route_is_in_the_table(tmp_path: Path) -> None:
    listed = OPEN | set(KEYED) | {(method, path) for method, path, _ in OWNED}
    assert set(routes(create_app(Settings(data_dir=tmp_path), []))) == listed


def send(server: ServerProcess, key: str | None, method: str, path: str, request: Request) -> httpx.Response:
    client = Wire(server.url, key).http
    headers = dict(client.headers) | request.get("headers", {})
    return client.request(method, path, **(request | {"headers": headers}))


@pytest.fixture(scope="module")
def alices(server: ServerProcess) -> Things:
    wire = Wire(server.url, ALICE)
    session = wire.session()
    model = wire.model(session)
    saved = wire.result(wire.post("save_weights", model_id=model, seq_id=1, path="mine"))["path"]
    exporting = wire.post("save_weights_for_sampler", model_id=model, seq_id=2, path="mine")
    exported = wire.result(exporting)["path"]
    made = wire.post(
        "create_sampling_session", session_id=session, sampling_session_seq_id=0, model_path=exported
    )
    sampler = made.json()["sampling_session_id"]
    return Things(session, model, sampler, exporting.json()["request_id"], saved, exported)


@pytest.mark.parametrize(("method", "path"), sorted(OPEN))
def test_probes_need_no_key(server: ServerProcess, method: str, path: str) -> None:
    assert send(server, None, method, path, {}).status_code == 200


@pytest.mark.parametrize(("method", "path"), list(KEYED))
def test_a_key_is_needed(server: ServerProcess, alices: Things, method: str, path: str) -> None:
    request = KEYED[method, path]
    for key in (None, "tml-wrong", ""):
        assert send(server, key, method, path, request).status_code == 401
    expected = 410 if path in GONE else 403 if (method, path) in REFUSED else 200
    assert send(server, BOB, method, path, request).status_code == expected


def told(answer: httpx.Response, ids: Things) -> tuple[int, str]:
    """An answer without the ids that it repeats: what it tells about them."""
    text = answer.text
    for identifier in sorted(vars(ids).values(), key=len, reverse=True):
        text = text.replace(identifier, "…")
    names = (*ids.exported.removeprefix("tinker://").split("/"), ids.model, ids.session)
    for name in names:
        text = text.replace(name, "…")
    return answer.status_code, text


@pytest.mark.parametrize(
    ("method", "path", "build"), OWNED, ids=[f"{method} {path}" for method, path, _ in OWNED]
)
def test_anothers_things_do_not_exist(
    server: ServerProcess, alices: Things, method: str, path: str, build: Callable[[Things], Request]
) -> None:
    url = alices.url(path)
    refused_before = build(alices)
    for key in (None, "tml-wrong"):
        assert send(server, key, method, url, refused_before).status_code == 401
    foreign = told(send(server, BOB, method, url, refused_before), alices)
    unknown = told(send(server, BOB, method, NOBODYS.url(path), build(NOBODYS)), NOBODYS)
    assert foreign == unknown
    assert foreign[0] in ((200,) if path in SILENT else (404, 410))
    if path in ENDING:
        alices = replace(alices, model=Wire(server.url, ALICE).model())
    own = send(server, ALICE, method, url, build(alices))
    expected = 400 if path in UNTRAINED else 302 if path.endswith("/archive") else 200
    assert own.status_code == expected, own.text


def test_one_s_own_session_does_not_open_anothers_things(server: ServerProcess, alices: Things) -> None:
    """A request that names two things needs both to be the caller's."""
    bob = Wire(server.url, BOB)
    session = bob.session()
    model = bob.model(session)
    saved = alices.saved
    assert bob.post("load_weights", model_id=model, seq_id=1, path=saved).status_code == 404
    new = bob.post("load_weights", session_id=session, model_seq_id=5, path=saved)
    assert new.status_code == 404
    sampling = bob.post(
        "create_sampling_session",
        session_id=session,
        sampling_session_seq_id=0,
        model_path=alices.exported,
    )
    assert sampling.status_code == 404


@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        ({"X-API-Key": ""}, 401, "missing API key"),
        ({"X-API-Key": "  "}, 401, "missing API key"),
        ({"Authorization": "Bearer"}, 401, "missing API key"),
        ({"Authorization": "Bearer "}, 401, "missing API key"),
        ({"X-API-Key": "", "Authorization": f"Bearer {ALICE}"}, 200, ""),
        ({"Authorization": f"bearer   {ALICE}"}, 200, ""),
        ({"Authorization": f"BEARER {ALICE} "}, 200, ""),
        ({"X-API-Key": f" {ALICE} "}, 200, ""),
        ({"Authorization": f"Basic {ALICE}"}, 401, "missing API key"),
        ({"X-API-Key": "tml-", "Authorization": f"Bearer {ALICE}"}, 401, "does not know it"),
    ],
)
def test_an_empty_header_is_not_a_key(
    server: ServerProcess, headers: dict[str, str], status: int, message: str
) -> None:
    connection = HTTPConnection("127.0.0.1", server.port)  # unlike httpx it sends any header
    connection.request("GET", "/api/v1/sessions", headers=headers)
    answer = connection.getresponse()
    assert answer.status == status
    assert message in answer.read().decode()
    connection.close()


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "::1", "[::1]", "::ffff:127.0.0.1", "169.254.169.254", "10.0.0.2", "127.1"],
)
def test_a_tenant_s_server_is_nowhere_that_the_operator_does_not_allow(
    server: ServerProcess, host: str
) -> None:
    """Also on a server that listens on loopback alone."""
    alice = Wire(server.url, ALICE)
    asked = {"host": host, "port": 9, "api_key": "sk-secret"}
    answer = alice.http.post("/add_inference_endpoint", json=asked)
    assert not answer.json()["success"]
    assert "--sglang-allow" in answer.json()["message"]
    assert "sk-secret" not in answer.text
    assert alice.http.get("/list_inference_endpoints").json()["endpoints"] == []
