"""`python -m fixed_rate_engine`: an engine that computes nothing, at a fixed rate of tokens per second.

It reads messages from the server's socket as the engine does, checks and packs datums, waits as long as a
device of `TINSMITH_TEST_RATE` tokens per second would take, and answers with log-probs of the right shapes.
When it ends it writes to `TINSMITH_TEST_REPORT`, as JSON, the tokens, and the seconds from its first
forward_backward to its last answer, of which it had nothing to do (`waited`) or worked on the host (`host`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
from tinsmith.engine import messages
from tinsmith.engine.socket import Socket
from tinsmith.engine.training import validation
from tinsmith.engine.training.packing import pack, shape_table

VOCABULARY, LONGEST, MICRO_BATCH = 320, 32768, 32768


class FixedRateEngine:
    """Answers every request in the order of arrival."""

    def __init__(self, socket: Socket, rate: float):
        self._socket, self._rate = socket, rate
        self._table = shape_table(LONGEST, MICRO_BATCH)
        self._began: float | None = None
        self._ended = 0.0
        self._tokens = 0
        self._waited = self._host = 0.0

    def run(self) -> dict[str, float]:
        """Until a Stop."""
        self._socket.send(messages.Status("ready", "ready"))
        while True:
            asked = time.perf_counter()
            request = self._socket.inbox.get()
            if self._began is not None:
                self._waited += time.perf_counter() - asked
            output = self._answer(request)
            self._socket.send(messages.Done(request.request_id, output))
            if isinstance(request, messages.Stop):
                break
            if isinstance(request, messages.ForwardBackward):
                self._ended, waited = time.perf_counter(), self._waited
        began = self._began or 0.0
        return {
            "tokens": self._tokens,
            "seconds": self._ended - began,
            "waited_seconds": waited,
            "host_seconds": self._host,
        }

    def _answer(self, request: messages.ToEngine) -> messages.Output:
        match request:
            case messages.CreateModel():
                return messages.ModelCreated(request.lora)
            case messages.ForwardBackward():
                return self._forward_backward(request)
            case messages.OptimStep():
                return messages.OptimStepOutput({"grad_norm": 1.0})
        return messages.Nothing()

    def _forward_backward(self, operation: messages.ForwardBackward) -> messages.ForwardBackwardOutput:
        began = time.perf_counter()
        self._began = self._began or began
        chosen = validation.check_loss(operation.loss_fn, operation.loss_config)
        data = validation.check_data(operation.data, chosen, VOCABULARY, LONGEST)
        lengths = [len(datum.tokens) for datum in data]
        for micro_batch in pack(lengths, [0] * len(lengths), self._table):
            micro_batch.lay([datum.tokens for datum in data], (), np.int32)
            micro_batch.lay([datum.targets for datum in data], (1,), np.int32)
            micro_batch.lay([datum.inputs["weights"] for datum in data], (1,), np.float32)
        logprobs = [np.full(length, -1.0, "<f4") for length in lengths]
        tensors = [messages.Tensor("float32", each.shape, each.tobytes()) for each in logprobs]
        host = time.perf_counter() - began
        self._host += host
        self._tokens += sum(lengths)
        time.sleep(sum(lengths) / self._rate)
        return messages.ForwardBackwardOutput(tensors, {"loss:sum": 1.0, "tokens:sum": float(sum(lengths))})


def main() -> None:
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=messages.EngineConfig)
    socket = Socket(config.address, config.beat_seconds)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    report = FixedRateEngine(socket, float(os.environ["TINSMITH_TEST_RATE"])).run()
    Path(os.environ["TINSMITH_TEST_REPORT"]).write_text(json.dumps(report))
    socket.close()


if __name__ == "__main__":
    main()
