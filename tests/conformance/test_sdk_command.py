"""The command `tinker`: runs, checkpoints and sessions, and how much of a run other tenants see."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tinker
from conformance.conftest import ALICE, BOB
from conformance.sdk_command import cli
from conformance.server_process import ServerProcess, Wire


def test_the_sdk_s_command(server: ServerProcess, training: tinker.TrainingClient, tmp_path: Path) -> None:
    run = training.model_id
    session = run.partition(":")[0]
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    token = Wire(server.url, ALICE).post("auth/token").json()["jwt"]
    first, second = (training.save_state(name).result().path for name in ("first", "second"))
    runs, one, listed, of_run, info, _, _, changed, who, used, stored, trace = (
        printed.json
        for printed in cli(
            server,
            "run list --limit 50",
            f"run info {run}",
            "checkpoint list",
            f"checkpoint list --run-id {run}",
            f"checkpoint info {first}",
            f"checkpoint publish {first}",
            f"checkpoint set-ttl {first} --ttl 7200",
            f"checkpoint info {first}",
            "auth whoami",
            f"billing usage {hour.isoformat()} {(hour + timedelta(hours=2)).isoformat()}",
            "billing checkpoint-storage",
            f"session export-trace {session} --output {tmp_path / 'trace.json'}",
            key=token,  # in the place of a key; with a key there is no whoami
        )
    )
    assert run in {each["training_run_id"] for each in runs["runs"]}
    assert (one["base_model"], one["lora_rank"], one["corrupted"]) == ("tiny", 4, False)
    assert one["last_checkpoint"]["tinker_path"] == second
    assert {first, second} <= {each["tinker_path"] for each in listed["checkpoints"]}
    assert [each["tinker_path"] for each in of_run["checkpoints"]] == [second, first], "newest first"
    assert (info["tinker_path"], info["public"], info["expires_at"]) == (first, False, None)
    assert info["size_bytes"] > 0
    assert changed["public"]
    lives = datetime.fromisoformat(changed["expires_at"]) - datetime.now(UTC)
    assert timedelta(0) < lives <= timedelta(hours=2)

    assert who["user_urn"] == "tml:organization_user:alice"
    counts = [each["event_info"] for each in used["data"] if each["session_id"] == session]
    assert counts == [{"type": "checkpoint", "count": 2}]
    assert sum(each["size_bytes"] for each in stored["data"]) >= 2 * info["size_bytes"]
    assert trace["file_size_bytes"] == (tmp_path / "trace.json").stat().st_size
    assert json.loads((tmp_path / "trace.json").read_text())["otherData"] == {"session_id": session}

    of_bob, not_bobs = cli(
        server, f"checkpoint list --run-id {run}", f"checkpoint delete --yes {first}", key=BOB
    )
    assert [each["tinker_path"] for each in of_bob.json["checkpoints"]] == [first], "published only"
    assert not_bobs.json["deleted_count"] == 0
    assert "unknown checkpoint" in not_bobs.out

    _, deleted, left = cli(
        server,
        f"checkpoint unpublish {first}",
        f"checkpoint delete --yes {second}",
        f"checkpoint list --run-id {run}",
    )
    assert deleted.json["deleted_count"] == 1
    assert [(each["tinker_path"], each["public"]) for each in left.json["checkpoints"]] == [(first, False)]
    assert Wire(server.url, BOB).http.get(f"/api/v1/training_runs/{run}/checkpoints").status_code == 404


def test_published_checkpoints_are_what_others_see_of_a_run(
    server: ServerProcess, training: tinker.TrainingClient
) -> None:
    shown, hidden = (training.save_state(name).result().path for name in ("shown", "hidden"))
    run = training.model_id
    alice = tinker.RestClient(base_url=server.url, api_key=ALICE)
    bob = tinker.RestClient(base_url=server.url, api_key=BOB)

    def runs_of_bob(scope: str) -> set[str]:
        found = bob.list_training_runs(limit=1000, access_scope=scope).result().training_runs
        return {each.training_run_id for each in found}

    assert run not in runs_of_bob("accessible")
    alice.publish_checkpoint_from_tinker_path(shown).result()
    assert run in runs_of_bob("accessible")
    assert run not in runs_of_bob("owned")
    with pytest.raises(tinker.NotFoundError):
        bob.get_training_run(run).result()
    seen = bob.get_training_run(run, access_scope="accessible").result()
    assert seen.last_checkpoint.tinker_path == shown, "not the newer one, which is hidden"
    listed = bob.list_checkpoints(run).result().checkpoints
    assert [each.tinker_path for each in listed] == [shown]
    assert bob.get_weights_info_by_tinker_path(shown).result().lora_rank == 4
    with pytest.raises(tinker.NotFoundError):
        bob.get_weights_info_by_tinker_path(hidden).result()
    service = tinker.ServiceClient(base_url=server.url, api_key=BOB)
    assert service.create_training_client_from_state(shown).result().model_id
    with pytest.raises(tinker.NotFoundError):
        bob.publish_checkpoint_from_tinker_path(shown).result()
    service.close("success").result()


def test_projects_and_pages(server: ServerProcess) -> None:
    alice, bob = Wire(server.url, ALICE), Wire(server.url, BOB)
    session, of_bob = alice.session(), bob.session()
    models = [alice.model(session, number) for number in range(3)]
    theirs = bob.model(of_bob)
    for wire, each in ((alice, session), (bob, of_bob)):
        assigned = wire.http.put(f"/api/v1/sessions/{each}/project", json={"project_id": "p"})
        assert assigned.status_code == 200

    def page(**query: Any) -> dict[str, Any]:
        return alice.http.get("/api/v1/training_runs", params={"project_id": "p"} | query).json()

    first, second = page(limit=2), page(limit=2, offset=2)
    assert first["cursor"] == {"offset": 0, "limit": 2, "total_count": 3}
    found = [run["training_run_id"] for each in (first, second) for run in each["training_runs"]]
    assert sorted(found) == sorted(models)
    assert theirs not in found
    assert not page(project_id="q")["training_runs"]
    assert alice.http.get("/api/v1/training_runs", params={"access_scope": "all"}).status_code == 422
    sessions = alice.http.get("/api/v1/sessions", params={"limit": 1, "access_scope": "accessible"}).json()
    assert sessions["sessions"] == [session]
