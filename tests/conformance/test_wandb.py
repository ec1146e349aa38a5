"""A model's metrics as a run of Weights & Biases, written offline, read back as its format says."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

import pytest
from conformance.server_process import ServerProcess, Wire

pytest.importorskip("wandb")

KEY = "5ec2e7" * 8
BLOCK, FULL, LAST = 1 << 15, 1, 4


def logged_records(content: bytes) -> Iterator[bytes]:
    """LevelDB's log format behind seven bytes: blocks of 32 KiB, pieces of (crc, length, type)."""
    at, record = 7, b""
    while at + 7 <= len(content):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST):
            yield record
            record = b""


def records(server: ServerProcess) -> list[dict[str, float]]:
    """Return the metrics that every step has logged."""
    from wandb.proto import wandb_internal_pb2

    (file,) = server.data_dir.glob("wandb/wandb/offline-run-*/*.wandb")
    found = []
    for data in logged_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = ((each.key or ".".join(each.nested_key), each.value_json) for each in record.history.item)
            found.append({key: json.loads(value) for key, value in items})
    return found


@pytest.mark.slow
def test_steps_are_written_and_the_key_nowhere(make_server) -> None:
    server: ServerProcess = make_server(TINSMITH_WANDB_MODE="offline").start()
    wire = Wire(server.url, "tml-local")
    asked = {"enabled": True, "project": "tins", "run_name": "first", "group": "a", "api_key": KEY}
    made = wire.post(
        "create_model",
        session_id=wire.session(),
        model_seq_id=0,
        base_model="tiny",
        lora_config={"rank": 4},
        wandb_config=asked,
    )
    model = wire.result(made)["model_id"]
    losses = []
    for step in range(3):
        two = [wire.result(wire.forward_backward(model, 3 * step + i)) for i in (1, 2)]
        losses.append(sum(each["metrics"]["loss:sum"] for each in two))
        stepped = wire.result(wire.optim_step(model, 3 * step + 3, learning_rate=0.01))
    wire.result(wire.post("unload_model", model_id=model))
    assert server.stop() == 0
    logged = records(server)
    assert [each["optimizer_step"] for each in logged] == [1, 2, 3]
    assert [each["loss:sum"] for each in logged] == pytest.approx(losses)
    assert logged[-1]["grad_norm"] == pytest.approx(stepped["metrics"]["grad_norm"])
    assert logged[0]["loss:mean"] == pytest.approx(losses[0] / 8)

    assert KEY not in server.log
    for file in server.data_dir.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
