"""The commands that look at a server from a terminal, with a real server and its real log."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import pytest
from conformance.conftest import ALICE
from conformance.server_process import ServerProcess, Wire

ServerMaker = Callable[..., ServerProcess]


def tinsmith(server: ServerProcess, *arguments: str, key: str = ALICE) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": key, "COLUMNS": "160"}
    command = [sys.executable, "-m", "tinsmith.server.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def watched(make_server: ServerMaker) -> ServerProcess:
    return make_server("--api-key", f"alice={ALICE}", "--log-format", "json", "--log-level", "debug").start()


@pytest.fixture(scope="module")
def model(watched: ServerProcess) -> str:
    wire = Wire(watched.url, ALICE)
    model = wire.model()
    wire.result(wire.post("save_weights", model_id=model, path="evening", seq_id=1))
    return model


def test_status_and_runs(watched: ServerProcess, model: str) -> None:
    seen = tinsmith(watched, "status")
    assert seen.returncode == 0, seen.stderr
    assert re.search(r"engine +ready", seen.stdout)
    assert re.search(r"models +1 in the engine, of 1 sessions", seen.stdout)
    assert re.search(r"memory +[\d.]+ [kMGT]B for each device; base ", seen.stdout)
    assert re.search(r"disk +[\d.]+ GB free; .*ledger [\d.]+ \w+", seen.stdout)
    assert model in seen.stdout
    listed = json.loads(tinsmith(watched, "runs", "--json").stdout)
    assert [each["training_run_id"] for each in listed] == [model]
    one = tinsmith(watched, "runs", model).stdout
    assert "LoRA 4" in one
    assert "weights/evening" in one


def test_a_key_that_is_wrong_and_a_run_that_is_not_there(watched: ServerProcess) -> None:
    wrong = tinsmith(watched, "runs", key="tml-other")
    assert wrong.returncode == 2
    assert "invalid API key" in wrong.stderr
    missing = tinsmith(watched, "runs", "nobody:train:0")
    assert missing.returncode == 2
    assert "nobody:train:0" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1


def test_top_is_redrawn_until_it_is_stopped(watched: ServerProcess, model: str) -> None:
    environment = os.environ | {"TINKER_BASE_URL": watched.url, "TINKER_API_KEY": ALICE, "COLUMNS": "160"}
    command = [sys.executable, "-m", "tinsmith.server.cli", "top", "--every", "0.2"]
    ours, theirs = pty.openpty()
    # A job in the background of a script, as these tests may be, ignores SIGINT, and so would its children.
    interruptible = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    running = subprocess.Popen(
        command, env=environment, stdout=theirs, stderr=theirs, preexec_fn=interruptible
    )
    shown, deadline = b"", time.monotonic() + 120
    try:
        while shown.count(model.encode()) < 2 and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.5)[0]:
                shown += os.read(ours, 1 << 16)
    finally:
        running.send_signal(signal.SIGINT)
    assert shown.count(model.encode()) >= 2
    while running.poll() is None and time.monotonic() < deadline:  # it writes until its end
        if select.select([ours], [], [], 0.5)[0]:
            os.read(ours, 1 << 16)
    running.wait(0)


def test_the_log_is_one_of_both_processes_with_the_ids(watched: ServerProcess, model: str) -> None:
    answer = Wire(watched.url, ALICE).http.get("/api/v1/training_runs", headers={"X-Request-Id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    shown = tinsmith(watched, "logs", "-n", "100000", "--data-dir", str(watched.data_dir)).stdout
    lines = [json.loads(line) for line in shown.splitlines()]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    (mine,) = (line for line in lines if line.get("request_id") == "mine-1")
    assert mine["tenant"] == "alice"
    assert "training_runs" in mine["message"]
    saved = [line for line in lines if line.get("operation_id") and line.get("model_id") == model]
    assert any("SaveState" in line["message"] for line in saved)  # of the engine
    submitted = [line for line in lines if "save_weights" in line["message"] and "request_id" in line]
    assert submitted[0]["operation_id"] == saved[-1]["operation_id"]  # of the server, for the same operation
    engine = tinsmith(watched, "logs", "--of", "engine", "--data-dir", str(watched.data_dir)).stdout
    assert {json.loads(line)["logger"].split(".")[0] for line in engine.splitlines()} == {"engine"}
    assert watched.data_dir.joinpath("logs").stat().st_mode & 0o077 == 0


def test_a_server_that_logs_json_prints_nothing_else(watched: ServerProcess, tmp_path) -> None:
    """Its first line, which says where it is, is JSON too, and so are the lines of a start that fails."""
    lines = [json.loads(line) for line in watched.log.splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, lines))
    first = next(line["message"] for line in lines if line["message"].startswith("Tinsmith"))
    assert first.endswith(f"on {watched.url}")
    assert any(line["message"] == f"export TINKER_BASE_URL={watched.url}" for line in lines)
    serve = ("serve", "--log-format", "json", "--model", "tiny=/nowhere", "--port", "0")
    refused = tinsmith(watched, *serve, "--data-dir", str(tmp_path))
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert json.loads(line) | {"time": ""} == {
        "time": "",
        "level": "error",
        "logger": "server",
        "message": "model '/nowhere': there is no such folder",
    }
    assert refused.stdout == ""


def test_the_log_is_followed(watched: ServerProcess) -> None:
    command = [sys.executable, "-m", "tinsmith.server.cli", "logs", "-f", "--data-dir", str(watched.data_dir)]
    following = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert following.stdout is not None
    following.stdout.readline()  # it has begun
    Wire(watched.url, ALICE).http.get("/api/v1/sessions", headers={"X-Request-Id": "followed-1"})
    try:
        for line in following.stdout:
            if "followed-1" in line:
                return
    finally:
        following.kill()
    pytest.fail("the line did not come")


def test_doctor_tells_what_is_wrong_and_what_to_do(watched: ServerProcess) -> None:
    found = tinsmith(
        watched,
        *("doctor", "--json", "--data-dir", str(watched.data_dir), "--port", str(watched.port)),
        *("--model", "/nowhere", "--mesh", "fsdp=64", "--sglang", "http://127.0.0.1:1"),
    )
    assert found.returncode == 1
    findings = json.loads(found.stdout)
    wrong = {each["what"]: each for each in findings if each["state"] != "ok"}
    assert "in use by another server" in wrong["ledger"]["text"]
    assert f"{watched.port} is in use" in wrong["port"]["text"]
    assert "64 devices" in wrong["devices"]["text"]
    assert "/nowhere" in wrong["model"]["text"]
    assert "127.0.0.1:1" in wrong["sglang"]["text"]
    assert all(each["advice"] for each in wrong.values())
    assert watched.process is not None
    assert f"by {sys.executable} -m tinsmith.server.cli serve" in wrong["port"]["text"]
    assert f"kill {watched.process.pid}" in wrong["port"]["advice"]
    assert "--port" in wrong["port"]["advice"]


def test_doctor_says_what_a_model_s_folder_lacks(watched: ServerProcess, tiny_model, tmp_path) -> None:
    def model(entry: str) -> dict:
        data = ("--data-dir", str(tmp_path / "data"), "--port", "0")
        found = json.loads(tinsmith(watched, "doctor", "--json", *data, "--model", entry).stdout)
        (wrong,) = (each for each in found if each["state"] != "ok")
        assert wrong["what"] == "model"
        return wrong

    folder = tmp_path / "model"
    folder.mkdir()
    assert f"{folder} lacks config.json, *.safetensors, tokenizer.json" in model(str(folder))["advice"]
    shutil.copy(tiny_model / "config.json", folder)
    assert f"{folder} lacks *.safetensors, tokenizer.json" in model(f"m={folder}")["advice"]
    for weights in tiny_model.glob("*.safetensors*"):
        shutil.copy(weights, folder)
    found = model(str(folder))
    assert (found["state"], found["text"]) == ("warning", "model has no tokenizer files")
    assert "token ids" in found["advice"]


@pytest.mark.parametrize(
    ("command", "how"),
    [
        ("status", "TINSMITH_URL"),
        ("status", "TINKER_BASE_URL"),
        ("status", "TINSMITH_CONFIG"),
        *((command, "TINSMITH_PORT") for command in ("status", "top", "runs")),
    ],
)
def test_the_server_is_the_one_of_the_environment(
    watched: ServerProcess, command: str, how: str, tmp_path
) -> None:
    (tmp_path / "server.toml").write_text(f'host = "0.0.0.0"\nport = {watched.port}\n')
    places = {"TINSMITH_PORT": str(watched.port), "TINSMITH_CONFIG": str(tmp_path / "server.toml")}
    names = {"TINSMITH_PORT", "TINSMITH_URL", "TINKER_BASE_URL", "TINSMITH_CONFIG"}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {how: places.get(how, watched.url), "TINKER_API_KEY": "tml-other"}
    asked = subprocess.run(
        [sys.executable, "-m", "tinsmith.server.cli", command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert asked.returncode == 2
    (line,) = asked.stderr.splitlines()
    assert "invalid API key" in line, "it is asked, and answers"


def test_loading_shows_its_progress(watched: ServerProcess, tiny_model) -> None:
    """The engine reports it to the server, so it is in /health, `status` and `top`."""
    found = re.findall(
        r"engine: loading: loading tiny \(1 of 1\) onto .*: ([\d.]+) of ([\d.]+) MB", watched.log
    )
    so_far, totals = ([float(each) for each in numbers] for numbers in zip(*found, strict=True))
    assert so_far == sorted(so_far)
    assert len(so_far) > 5
    size = sum(file.stat().st_size for file in tiny_model.glob("*.safetensors")) / 1e6
    assert so_far[-1] == totals[-1] == pytest.approx(size, abs=0.1)


def test_a_merge_shows_its_progress(watched: ServerProcess, model: str, tmp_path) -> None:
    """Lines in a pipe; on a terminal, the seconds of each part and the bytes of each file."""
    merge = ("checkpoints", "merge", f"tinker://{model}/weights/evening")
    piped = tinsmith(watched, *merge, str(tmp_path / "piped"))
    assert piped.returncode == 0, piped.stderr
    lines = [line for line in piped.stderr.splitlines() if not line.startswith("waiting; the engine: ")]
    assert lines == [
        f"loading tinker://{model}/weights/evening on {watched.url}",
        "writing the merged files there",
    ]
    environment = os.environ | {"TINKER_BASE_URL": watched.url, "TINKER_API_KEY": ALICE}
    environment |= {"COLUMNS": "160", "TERM": "xterm"}
    command = [sys.executable, "-m", "tinsmith.server.cli", *merge, str(tmp_path / "drawn")]
    ours, theirs = pty.openpty()
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    drawn = b""
    with contextlib.suppress(OSError):  # a terminal of which the other side is closed
        while piece := os.read(ours, 1 << 16):
            drawn += piece
    assert running.wait(60) == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    assert re.search(r"loading tinker://\S+ on http\S+ .*\d:\d\d:\d\d", shown)
    assert re.search(r"writing the merged files there .*\d:\d\d:\d\d", shown)
    assert re.search(r"model\.safetensors .*[\d.]+/[\d.]+ [kM]B", shown)
    assert (tmp_path / "drawn" / "model.safetensors").is_file()


def test_doctor_tells_that_devices_would_be_idle(
    watched: ServerProcess, tiny_model, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    options = ("--data-dir", str(tmp_path), "--port", "0", "--model", f"tiny={tiny_model}")
    found = tinsmith(watched, "doctor", *options)
    assert found.returncode == 0, found.stdout
    assert (
        "! devices: the server would use 1 of 2 devices\n    to use all of them, add --mesh fsdp=2"
        in found.stdout
    )
    assert "would use" not in tinsmith(watched, "doctor", *options, "--mesh", "data=2").stdout


def test_doctor_finds_nothing_wrong(watched: ServerProcess, tiny_model, tmp_path) -> None:
    found = tinsmith(
        watched,
        "doctor",
        "--data-dir",
        str(tmp_path / "data"),
        "--port",
        "0",
        "--model",
        f"tiny={tiny_model}",
    )
    assert found.returncode == 0, found.stdout
    assert "✗" not in found.stdout
    assert not (tmp_path / "data").exists()
