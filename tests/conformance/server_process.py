"""A real server process on tiny models, and a raw client that speaks the wire without the SDK's help."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
from tinker.proto import tinker_public_pb2 as pb

START_SECONDS = 180
PROTOBUF = "application/x-protobuf"


class ServerProcess:
    """`tinsmith serve` with its engine; `start` waits until the engine is ready."""

    def __init__(
        self,
        model: Path,
        data_dir: Path,
        cache_dir: Path,
        *options: str,
        launcher: Path | None = None,
        **environment: str,
    ):
        """`launcher`: a program that takes the place of `python -m tinsmith.server.cli`."""
        self._command = [
            *(
                (sys.executable, "-m", "tinsmith.server.cli")
                if launcher is None
                else (sys.executable, launcher)
            ),
            *("serve", "--model", f"tiny={model}"),
            *("--data-dir", str(data_dir), "--cache-dir", str(cache_dir), *options),
        ]
        self._environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
        self.data_dir = data_dir
        self._log = data_dir.parent / f"{data_dir.name}.log"
        self.port = 0
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text()

    def start(self, wait_for_engine: bool = True) -> ServerProcess:
        """Start on a port of the system's choice, and on the same one again after a stop."""
        with self._log.open("a") as log:
            start = log.tell()
            self.process = subprocess.Popen(
                [*self._command, "--port", str(self.port)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended:\n{self.log}"
            found = re.search(r"on http://127.0.0.1:(\d+)", self.log[start:])
            if found:
                self.port = int(found.group(1))
                health = self.health()
                if health is not None and (health["engine"]["ready"] or not wait_for_engine):
                    return self
            time.sleep(0.1)
        raise TimeoutError(f"the server did not become ready:\n{self.log}")

    def health(self) -> dict | None:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).json()
        except httpx.TransportError:
            return None

    @property
    def engine(self) -> psutil.Process:
        assert self.process is not None
        (engine,) = (
            child
            for child in psutil.Process(self.process.pid).children()
            if "tinsmith.engine" in child.cmdline()
        )
        return engine

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """The exit code."""
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(120)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Wire:
    """Bare requests, one owner."""

    def __init__(self, url: str, key: str | None):
        headers = {"X-API-Dialect": "tinker"} | ({} if key is None else {"X-API-Key": key})
        self.http = httpx.Client(base_url=url, headers=headers, timeout=60)

    def post(self, path: str, /, **body) -> httpx.Response:
        return self.http.post(f"/api/v1/{path}", json=body)

    def session(self) -> str:
        return self.post("create_session", tags=[], sdk_version="0.38.0").json()["session_id"]

    def model(self, session: str | None = None, number: int = 0, rank: int = 4) -> str:
        created = self.post(
            "create_model",
            session_id=session or self.session(),
            model_seq_id=number,
            base_model="tiny",
            lora_config={"rank": rank, "seed": 1},
        )
        return self.result(created)["model_id"]

    def forward_backward(
        self,
        model: str,
        seq_id: int,
        datums: list[pb.Datum] | None = None,
        loss: str = "cross_entropy",
        **fields,
    ) -> httpx.Response:
        request = pb.ForwardBackwardRequest(
            model_id=model,
            seq_id=seq_id,
            loss_fn=loss,
            data=[datum()] if datums is None else datums,
            **fields,
        )
        return self.post_protobuf(request.SerializeToString())

    def post_protobuf(self, body: bytes, **headers: str) -> httpx.Response:
        return self.http.post(
            "/api/v1/forward_backward", content=body, headers={"Content-Type": PROTOBUF} | headers
        )

    def optim_step(self, model: str, seq_id: int, **adam) -> httpx.Response:
        return self.post("optim_step", model_id=model, seq_id=seq_id, adam_params=adam, type="optim_step")

    def poll(self, request_id: str, accept: str = "application/json") -> httpx.Response:
        return self.http.post(
            "/api/v1/retrieve_future", json={"request_id": request_id}, headers={"Accept": accept}
        )

    def result(self, submitted: httpx.Response, seconds: float = 120) -> dict:
        """The JSON answer of a submitted operation, polled as the SDK does."""
        assert submitted.status_code == 200, submitted.text
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            answer = self.poll(submitted.json()["request_id"])
            if answer.status_code != 408:
                assert answer.status_code == 200, answer.text
                return answer.json()
        raise TimeoutError(submitted.text)


def tensor(values, dtype: str = "float32", shape: list[int] | None = None) -> pb.Tensor:
    array = np.asarray(values, {"float32": "<f4", "int64": "<i8", "int32": "<i4"}[dtype])
    code = {"float32": pb.DTYPE_FLOAT32, "int64": pb.DTYPE_INT64, "int32": pb.DTYPE_INT32}[dtype]
    return pb.Tensor(dense=array.tobytes(), dtype=code, shape=list(array.shape) if shape is None else shape)


def datum(tokens=(5, 6, 7, 8), targets=(6, 7, 8, 9), **inputs: pb.Tensor) -> pb.Datum:
    """A cross-entropy datum; `inputs` replace or add tensors."""
    made = pb.Datum(
        model_input=[pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=np.asarray(tokens, "<i4").tobytes()))]
    )
    given = {
        "target_tokens": tensor(targets, "int64"),
        "weights": tensor([1.0] * len(targets)),
    } | inputs
    for name, value in given.items():
        made.loss_fn_inputs[name].CopyFrom(value)
    return made
