"""Usage, the audit log, storage, traces and identities, through the SDK; what of it others see: nothing."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from conformance.batches import batch, targets
from conformance.conftest import ALICE, BOB
from conformance.server_process import ServerProcess, Wire
from conformance.test_sdk_checkpoints import PROMPT
from tinker import types
from tinker.cli.auth_api import AuthApiError, TinkerAuthApi
from tinsmith.server.cli import app
from typer.testing import CliRunner

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PARAMS = tinker.SamplingParams(max_tokens=3, temperature=0.0, stop=[])
INVALID = 'Bearer error="invalid_token"'


def window() -> tuple[datetime, datetime]:
    """The hours of this test, also when it ends in the next one."""
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    return hour - timedelta(hours=1), hour + timedelta(hours=2)


def rest(server: ServerProcess, key: str = ALICE) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.url, api_key=key)


def admin(server: ServerProcess, key: str = ALICE) -> tinker.AdminClient:
    return tinker.AdminClient(base_url=server.url, api_key=key)


def used(usage: types.BillingUsageResponse, session: str) -> dict[Any, int]:
    """Return a session's usage, by kind and, for prefills, by whether they were cached."""
    found: dict[Any, int] = {}
    for event in usage.data:
        if event.session_id == session:
            info = event.event_info
            kind = (info.type, info.cached) if info.type == "sampling_prefill" else info.type
            found[kind] = found.get(kind, 0) + (info.count if kind == "checkpoint" else info.token_count)
    return found


def test_usage(server: ServerProcess) -> None:
    metadata = {"for": "the bill"}
    service = tinker.ServiceClient(
        base_url=server.url, api_key=ALICE, user_metadata=metadata, project_id="counted"
    )
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
    session = training.model_id.partition(":")[0]
    data = batch(3)
    training.forward(data, "cross_entropy").result()
    training.forward_backward(data, "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    with pytest.raises(tinker.TinkerError):
        training.forward_backward(data, "no such loss").result()
    training.save_state("state").result()
    sampler = training.save_weights_and_get_sampling_client().result()
    lengths = [len(each.tokens) for each in sampler.sample(PROMPT, 2, PARAMS).result().sequences]
    lengths.append(len(sampler.sample(PROMPT, 1, PARAMS).result().sequences[0].tokens))

    async def usages() -> list[types.BillingUsageResponse]:
        mine = rest(server)
        return [
            admin(server).get_billing_usage(*window()).result(),
            await admin(server).get_billing_usage_async(*window()),
            mine.get_billing_usage(*(each.isoformat() for each in window())).result(),
            await mine.get_billing_usage_async(*window()),
        ]

    for usage in asyncio.run(usages()):
        counts = used(usage, session)
        prefilled = counts.pop(("sampling_prefill", False), 0) + counts.pop(("sampling_prefill", True), 0)
        assert prefilled == 2 * len(PROMPT.to_ints())
        trained = 2 * sum(targets(data))
        assert counts == {"training": trained, "sampling_sample": sum(lengths), "checkpoint": 1}
        assert usage.sessions[session].user_metadata == metadata
        (event, *_) = (each for each in usage.data if each.session_id == session)
        assert (event.base_model, event.project_id, event.user_name) == ("tiny", "counted", "alice")
        assert event.bucket_end - event.bucket_start == timedelta(hours=1)
        assert event.estimated_cost_usd is None
    assert not used(admin(server, BOB).get_billing_usage(*window()).result(), session)

    start, end = window()
    wrong = [
        (start + timedelta(minutes=1), end),
        (end, start),
        (start, start),
        (start, start + timedelta(days=14, hours=1)),
        (start + timedelta(days=2), start + timedelta(days=3)),
    ]
    for first, last in wrong:
        with pytest.raises(tinker.BadRequestError):
            admin(server).get_billing_usage(first, last).result()
    service.close("success").result()


def test_storage(server: ServerProcess) -> None:
    service = tinker.ServiceClient(base_url=server.url, api_key=ALICE, project_id="stored")
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
    training.save_state("one").result()
    gone = training.save_weights_external("two").result().path

    async def four() -> list[types.CurrentCheckpointStorageUsageResponse]:
        return [
            admin(server).get_current_checkpoint_storage_usage("stored").result(),
            await admin(server).get_current_checkpoint_storage_usage_async("stored"),
            rest(server).get_current_checkpoint_storage_usage("stored").result(),
            await rest(server).get_current_checkpoint_storage_usage_async("stored"),
        ]

    def size() -> int:
        listed = rest(server).list_checkpoints(training.model_id).result().checkpoints
        return sum(each.size_bytes for each in listed)

    for usage in asyncio.run(four()):
        (item,) = usage.data
        assert (item.project_id, item.checkpoint_count, item.size_bytes) == ("stored", 2, size())
        assert item.size_gigabytes == pytest.approx(size() / 1e9)
        assert item.estimated_monthly_cost_usd is None
    rest(server).delete_checkpoint_from_tinker_path(gone).result()
    every = admin(server).get_current_checkpoint_storage_usage().result().data
    assert {item.project_id: item.size_bytes for item in every}["stored"] == size()
    assert not admin(server, BOB).get_current_checkpoint_storage_usage("stored").result().data
    service.close("success").result()


def test_audit_log(server: ServerProcess) -> None:
    start = datetime.now(UTC)
    service = tinker.ServiceClient(
        base_url=server.url, api_key=ALICE, user_metadata={"note": "a client's secret"}
    )
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
    run = training.model_id
    session = run.partition(":")[0]
    mine = rest(server)
    path = training.save_weights_external("told").result().path
    with pytest.raises(tinker.TinkerError):
        training.save_weights_external("told").result()
    mine.publish_checkpoint_from_tinker_path(path).result()
    copied = mine.copy_weights(path, "kept").result()
    mine.unpublish_checkpoint_from_tinker_path(path).result()
    mine.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    url = next(iter(mine.get_external_weights_urls(path).result().urls.values()))
    assert httpx.get(url).status_code == 200
    mine.delete_checkpoint_from_tinker_path(path).result()
    mine.assign_session_project(session, "told").result()
    service.close("success").result()

    async def logs() -> list[types.AuditLogResponse]:
        return [
            admin(server).get_audit_log().result(),
            await admin(server).get_audit_log_async(day=start.date()),
            rest(server).get_audit_log(day=datetime.now(UTC).date()).result(),
            await rest(server).get_audit_log_async(),
        ]

    first, *others = asyncio.run(logs())
    events = [{each.event for each in log.entries} for log in (first, *others)]
    assert all(each == events[0] for each in events)

    def about(log: types.AuditLogResponse) -> list[str]:
        ids = {run, session, copied}
        return [each.event for each in log.entries if ids & set(map(str, each.event_details.values()))]

    told = [
        *("session_created", "model_created", "checkpoint_saved", "checkpoint_published"),
        *("checkpoint_copied", "checkpoint_unpublished", "checkpoint_ttl_set", "checkpoint_read"),
        *("checkpoint_deleted", "project_session_assigned", "session_finished"),
    ]
    assert about(first) == told
    times = [entry.timestamp for entry in first.entries]
    assert times == sorted(times)
    (read,) = (each for each in first.entries if each.event == "checkpoint_read" and each.model_id == run)
    assert (read.tinker_path, read.purpose) == (path, "download")
    assert "a client's secret" not in first.model_dump_json()

    of_checkpoints = admin(server).get_audit_log("checkpoints").result()
    assert about(of_checkpoints) == [each for each in told if each.startswith("checkpoint")]
    assert about(admin(server).get_audit_log("projects").result()) == ["project_session_assigned"]
    assert admin(server).get_audit_log("teams").result().entries == []
    assert admin(server).get_audit_log(day=start.date() - timedelta(days=2)).result().entries == []
    assert about(admin(server, BOB).get_audit_log().result()) == []
    mine.delete_checkpoint_from_tinker_path(copied).result()


def test_session_trace(server: ServerProcess) -> None:
    service = tinker.ServiceClient(base_url=server.url, api_key=ALICE)
    before = time.time()
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
    run = training.model_id
    session = run.partition(":")[0]
    training.forward_backward(batch(2), "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    sampler = training.save_weights_and_get_sampling_client().result()
    sampler.sample(PROMPT, 1, PARAMS).result()

    url = rest(server).export_session_trace(session).result()
    again = asyncio.run(rest(server).export_session_trace_async(session))
    assert again.partition("?")[0] == url.partition("?")[0]
    with urllib.request.urlopen(url) as answer:  # without a key
        trace = json.load(answer)
    names = {event["pid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    of_operation: dict[str, list[dict]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] != "M":
            of_operation.setdefault(event["id"], []).append(event)
    shown = [(names[events[0]["pid"]], events[0]["name"]) for events in of_operation.values()]
    assert shown == [
        *((run, kind) for kind in ("create_model", "forward_backward", "optim_step", "save_unnamed_sampler")),
        (sampler._sampling_session_id, "sample"),
    ]
    for events in of_operation.values():
        times = [event["ts"] for event in events]
        assert times == sorted(times), "submitted, started, finished"
        assert before * 1e6 <= times[0] <= times[-1] <= time.time() * 1e6
        assert [event["ph"] for event in events] in (["b", "b", "e", "e"], ["b", "e"])
    assert any(len(events) == 4 for events in of_operation.values()), "the time on the device"

    altered = httpx.get(url.replace(session, "0" * 32))
    assert altered.status_code == 403
    with pytest.raises(tinker.NotFoundError):
        rest(server, BOB).export_session_trace(session).result()
    with pytest.raises(RuntimeError, match="no operations"):
        rest(server).export_session_trace(Wire(server.url, ALICE).session()).result()
    service.close("success").result()


def test_console_urls_are_the_vendors(service: tinker.ServiceClient, training: tinker.TrainingClient) -> None:
    """The SDK has the host built in, and asks no server."""
    session = training.model_id.partition(":")[0]
    assert service.get_console_url().endswith(f"/sessions/{session}")
    assert training.get_console_url().endswith(f"/training_runs/{training.model_id}")


def test_a_sampler_s_tokenizer(
    service: tinker.ServiceClient, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found by the base model's name, which is a folder's here or a repository's on the hub."""
    monkeypatch.chdir(tiny_model.parent)
    sampler = service.create_sampling_client(base_model="tiny").result()
    assert sampler.get_tokenizer().encode("hello")


@pytest.fixture(scope="module")
def exchanging(make_server) -> ServerProcess:
    """A server that tells clients to exchange their keys for tokens. It has no keys until a test makes
    one."""
    return make_server(TINSMITH_TOKEN_EXCHANGE="1").start(wait_for_engine=False)


def keys(server: ServerProcess, *arguments: str) -> str:
    done = CliRunner().invoke(app, ["keys", *arguments, "--data-dir", str(server.data_dir)])
    assert done.exit_code == 0, done.output
    return done.stdout


def becomes(status: int, request) -> httpx.Response:
    """Within two seconds."""
    deadline = time.monotonic() + 2
    while (answer := request()).status_code != status and time.monotonic() < deadline:
        time.sleep(0.05)
    assert answer.status_code == status
    return answer


def test_keys_exchanged_for_tokens(exchanging: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    alice = keys(exchanging, "create", "alice", "--note", "laptop").strip()
    other = keys(exchanging, "create", "alice").strip()
    wire = Wire(exchanging.url, alice)
    becomes(401, lambda: Wire(exchanging.url, "tml-guess").post("auth/token"))
    session = wire.session()

    client = rest(exchanging, alice)
    who = client.whoami().result()
    assert (who.user_urn, who.org_urn, who.email) == (
        "tml:organization_user:alice",
        "tml:organization:alice",
        None,
    )
    assert client.list_sessions().result().sessions == [session]
    token = wire.post("auth/token").json()["jwt"]
    assert rest(exchanging, token).whoami().result() == who, "a token in the place of a key"
    # What the server rejects is exchanged for another one, once.
    client.holder._default_auth._token = f"{token[:-6]}AAAAAA"
    assert client.list_sessions().result().sessions == [session]

    monkeypatch.setenv("TINKER_BASE_URL", exchanging.url)
    with httpx.Client() as http:
        me = TinkerAuthApi(http).get_self_api_key(alice)
        assert (me.note, me.details.org_details.name) == ("laptop", "alice")
        assert f"{me.key_id:08x}" == me.name
        assert me.name in keys(exchanging, "list")
        with pytest.raises(AuthApiError, match="403"):
            TinkerAuthApi(http).delete_self_api_key(token)
        TinkerAuthApi(http).delete_self_api_key(alice)
    assert wire.http.get("/api/v1/sessions").status_code == 401, "at once"
    refused = Wire(exchanging.url, token).http.get("/api/v1/sessions")
    assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, INVALID)
    with pytest.raises(tinker.AuthenticationError):
        rest(exchanging, alice).list_sessions().result()

    log = rest(exchanging, other).get_audit_log("all").result().entries
    of_keys = [each for each in log if each.event.startswith("api_key")]
    assert [each.event for each in of_keys] == ["api_key_created", "api_key_created", "api_key_revoked"]
    assert of_keys[0].event_details["key_id"] == of_keys[2].event_details["key_id"] == me.name
    with sqlite3.connect(exchanging.data_dir / "ledger.db") as ledger:
        dump = "\n".join(ledger.iterdump())
    assert not [secret for secret in (alice, other, token) if secret in dump]


def test_a_revoked_key_s_token(exchanging: ServerProcess) -> None:
    key = keys(exchanging, "create", "carol").strip()
    becomes(200, lambda: Wire(exchanging.url, key).post("auth/token"))
    carol = Wire(exchanging.url, Wire(exchanging.url, key).post("auth/token").json()["jwt"])
    assert carol.http.get("/api/v1/sessions").status_code == 200
    (listed,) = (line for line in keys(exchanging, "list").splitlines() if "carol" in line)
    keys(exchanging, "revoke", listed.split()[0])
    refused = becomes(401, lambda: carol.http.get("/api/v1/sessions"))
    assert refused.headers["WWW-Authenticate"] == INVALID
