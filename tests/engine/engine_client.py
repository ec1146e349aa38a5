"""A real engine process on a tiny model, and the server's end of its socket."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import zmq
from tinsmith.engine import messages

CACHE = Path(__file__).parents[2] / ".cache" / "tests"
"""Compiled programs, kept from one test process to the next."""


class EngineClient:
    """Starts `python -m tinsmith.engine`; `ask` sends a request and returns its answer."""

    def __init__(self, folder: Path, model_folder: Path, wait: bool = True, **config):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        address = f"ipc://{self.folder}/e-{os.getpid()}-{time.monotonic_ns() % 10**6}"
        self._socket.bind(address)
        self.config = messages.EngineConfig(
            **{
                "address": address,
                "data_dir": str(self.folder / "data"),
                "cache_dir": str(CACHE),
                "base_models": [messages.BaseModel("tiny", str(model_folder))],
                "kv_cache_tokens": 2048,
                **config,
            }
        )
        self.log = self.folder / "engine.log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tinsmith.engine"],
            stdin=subprocess.PIPE,
            stderr=self.log.open("a"),
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        self.process.stdin.write(msgspec.json.encode(self.config))
        self.process.stdin.close()
        self.answers: dict[str, messages.Done | messages.Failed] = {}
        self.order: list[str] = []
        self.statuses: list[messages.Status] = []
        self._ids = (f"q{number}" for number in itertools.count())
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        while not any(status.phase == "ready" for status in self.statuses):
            self._read()

    def send(self, kind: type, **fields) -> str:
        """Send a request of that kind; its id."""
        request_id = next(self._ids)
        self._socket.send(messages.encode(kind(request_id=request_id, **fields)))
        return request_id

    def answer(self, request_id: str) -> messages.Done | messages.Failed:
        while request_id not in self.answers:
            self._read()
        return self.answers[request_id]

    def ask(self, kind: type, **fields) -> messages.Output:
        """The output of a request that must succeed."""
        answer = self.answer(self.send(kind, **fields))
        assert isinstance(answer, messages.Done), answer
        return answer.output

    def refused(self, kind: type, **fields) -> str:
        """The message of a request that must fail by the user's fault."""
        answer = self.answer(self.send(kind, **fields))
        assert isinstance(answer, messages.Failed), answer
        assert answer.category == "user", answer
        return answer.message

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def close(self) -> int:
        try:
            return self.process.wait(timeout=60)
        finally:  # also when it does not end: an open socket would stop the garbage collector for good
            self.process.kill()
            self._socket.close(linger=0)
            self._context.term()

    def stop(self) -> int:
        self.ask(messages.Stop)
        return self.close()

    def _read(self) -> None:
        deadline = time.monotonic() + 120
        while not self._socket.poll(1000):
            if self.process.poll() is not None and not self._socket.poll(0):
                raise RuntimeError(
                    f"the engine ended with {self.process.returncode}:\n{self.log.read_text()}"
                )
            if time.monotonic() > deadline:
                raise TimeoutError(self.log.read_text())
        message = messages.decode_from_engine(self._socket.recv())
        if isinstance(message, messages.Beat):
            return
        if isinstance(message, messages.Memory | messages.Measured):
            self.memory = message
            return
        if isinstance(message, messages.Status):
            self.statuses.append(message)
            return
        assert message.request_id not in self.answers, f"{message.request_id} answered twice"
        self.answers[message.request_id] = message
        self.order.append(message.request_id)


def lora(rank: int = 4, seed: int = 1, **fields) -> messages.LoraSpec:
    return messages.LoraSpec(rank=rank, alpha=32.0, seed=seed, **fields)


def datum(length: int, seed: int = 0, weight: float = 1.0, vocab: int = 320) -> messages.Datum:
    """Random tokens, each predicting the next."""
    tokens = np.random.default_rng(seed).integers(3, vocab, length + 1).astype("<i4")
    targets = messages.Tensor("int64", (length,), tokens[1:].astype("<i8").tobytes())
    weights = messages.Tensor("float32", (length,), np.full(length, weight, "<f4").tobytes())
    return messages.Datum(tokens[:-1].tobytes(), {"target_tokens": targets, "weights": weights})


def logprobs(output: messages.ForwardBackwardOutput) -> list[np.ndarray]:
    return [np.frombuffer(tensor.data, "<f4").reshape(tensor.shape) for tensor in output.logprobs]
