"""Samples and SGLang servers of ours in one process, with a ledger."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from engineless import Server
from tinsmith.engine import messages
from tinsmith.server.access import ApiKeys
from tinsmith.server.base_models import BaseModel, BaseModels
from tinsmith.server.files import Disk
from tinsmith.server.operations.operation import Operation, Submission
from tinsmith.server.plugins.sglang.endpoint import Endpoint
from tinsmith.server.plugins.sglang.endpoints import Endpoints, Registered
from tinsmith.server.plugins.sglang.merged_weights import Distribution
from tinsmith.server.plugins.sglang.sampling import Sampling
from tinsmith.server.settings import Settings
from tinsmith.server.supervision.supervisor import Supervisor

PROMPT = [5, 9, 77, 30, 12, 6]
MakePlace = Callable[..., Awaitable["Place"]]


class Place:
    """The server without routers and engine; what would go to the engine is `embedded`. Another one on its
    data directory is its next start."""

    def __init__(self, data_dir: Path, model: BaseModel, engine: messages.SamplingEngine, **settings: Any):
        data_dir.mkdir(exist_ok=True)
        self.data_dir = data_dir
        self.model, self.engine = model, engine
        self.drawn: list[messages.Drawn] = []
        self.embedded: list[Operation] = []
        self.server = Server(data_dir, self._sampling, **settings)
        self.operations = self.server.operations
        self.operations.send_to_engine = self.embedded.append  # type: ignore[method-assign]

    def _sampling(self, settings: Settings, engine: Supervisor) -> Sampling:
        models = BaseModels({self.model.name: self.model})
        self.endpoints = Endpoints(models)
        self.distribution = Distribution(
            settings, ApiKeys([]), engine, Disk(self.data_dir, 0), self.endpoints, models
        )
        self.sampling = Sampling(
            self.endpoints,
            self.distribution.adapters,
            models,
            self.engine,
            patience_seconds=300.0,
            on_drawn=self.drawn.append,
            on_answered=lambda _endpoint, _sample, _output: None,
        )
        return self.sampling

    def add(self, url: str) -> Registered:
        endpoint = Registered(Endpoint(url), None, None)
        self.endpoints.add(endpoint)
        return endpoint

    async def close(self) -> None:
        await self.sampling.finish(0)
        await self.distribution.close()
        await self.endpoints.close()
        self.server.ledger.close()

    async def ask(self, max_tokens: int = 8, stream: bool = False, weights: str | None = None) -> Operation:
        params = messages.SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_tokens=[])
        prompt = np.asarray(PROMPT, "<i4").tobytes()

        def message(request_id: str) -> messages.Sample:
            ref = messages.SamplerRef("tiny", weights)
            return messages.Sample(request_id, ref, prompt, 1, params, stream=stream)

        return await self.operations.accept(Submission("me", "sample", None, message))


async def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def tokens(operation: Operation, seconds: float = 60.0) -> list[int]:
    await asyncio.wait_for(operation.finished.wait(), seconds)
    assert isinstance(operation.answer, messages.Done), operation.answer
    assert isinstance(operation.answer.output, messages.SampleOutput)
    return np.frombuffer(operation.answer.output.sequences[0].tokens, "<i4").tolist()
