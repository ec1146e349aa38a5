"""Who answers a sample: the engine, or an SGLang server that has the weights it is asked of.

This is the only place where that is decided, for every route: `Operations.send` asks here before it sends a
sample to the engine, and what an SGLang server drew comes back as the engine's answers do. The ledger does
not know the difference, so what was not answered at a server's end is done again after the next start, by
whom there is then.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Literal, Protocol

import msgspec

from ....engine import messages
from ...base_models import BaseModel
from ...errors import BadRequest, internal_error
from ...operations.operation import Operation, Outcome
from .endpoint import CannotServe, EndpointBusy, EndpointDied, EndpointError, EndpointRefused
from .endpoints import Endpoints, Registered
from .remote_sample import RemoteSample
from .requests import why_not

log = logging.getLogger("tinsmith.inference")

_DEATHS = 3  # of servers, in one sample's turn
_WAIT_SECONDS = 1.0


class Adapters(Protocol):
    async def ensure(self, endpoint: Registered, sampler: messages.SamplerRef) -> str:
        """The name under which it has the adapter now. Raises EndpointError."""

    def lost(self, endpoint: Registered, sampler: messages.SamplerRef) -> None:
        """It does not have it, whatever was said."""


class Sampling:
    """`default`: by whom samples are answered that say nothing; `patience_seconds`: for so long those wait
    for a server that are for SGLang alone; `on_drawn`: told of tokens of streams; `on_answered`: of what a
    server has answered."""

    def __init__(
        self,
        endpoints: Endpoints,
        adapters: Adapters,
        base_models: dict[str, BaseModel],
        default: messages.SamplingEngine,
        patience_seconds: float,
        on_drawn: Callable[[messages.Drawn], None],
        on_answered: Callable[[Registered, messages.Sample, messages.SampleOutput], None],
    ):
        self._endpoints = endpoints
        self._adapters = adapters
        self._base_models = base_models
        self._default = default
        self._patience = patience_seconds
        self._on_drawn = on_drawn
        self._on_answered = on_answered
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by request id
        self._drawing: set[str] = set()  # those that a server has

    # --- what is decided

    def check(self, owner: str, sample: messages.Sample) -> None:
        """A sample that only SGLang may answer, and never will, is refused: BadRequest names the field."""
        if self._engine_of(sample) != "sglang":
            return
        model = self._base_models[sample.sampler.base_model]
        there = self._endpoints.all(model.name, owner)
        if not there and not self._endpoints.unchecked(owner):
            raise BadRequest(f"sampling_engine: no SGLang server is registered for {model.name!r}")
        known = [each.limits for each in there] or [None]
        reasons = [why_not(sample, model, limits, True) for limits in known]
        if all(reasons):
            raise BadRequest(f"{reasons[0]} (sampling_engine is sglang; `embedded` does it)")

    def take(self, operation: Operation, sample: messages.Sample, outcome: Outcome) -> bool:
        """Whether it is answered here; otherwise it is the engine's. Once sent there, it stays there."""
        if operation.request_id in self._tasks:
            return True
        engine = self._engine_of(sample)
        model = self._base_models.get(sample.sampler.base_model)
        there = model is not None and (
            self._endpoints.all(model.name, operation.owner) or self._endpoints.unchecked(operation.owner)
        )
        if operation.sent_in or model is None or engine == "embedded" or (engine == "auto" and not there):
            _give_seed(operation, sample)
            return False
        task = asyncio.ensure_future(self._answer(operation, sample, model, engine == "sglang", outcome))
        self._tasks[operation.request_id] = task
        task.add_done_callback(lambda _task: self._tasks.pop(operation.request_id, None))
        return True

    def cancel(self, operation: Operation) -> bool:
        """Whether it was being answered here; the SGLang server is told."""
        task = self._tasks.get(operation.request_id)
        if task is not None:
            task.cancel()
        return task is not None

    async def finish(self, seconds: float) -> None:
        """What servers are drawing ends; what has not after so long stays in the ledger."""
        for request_id, task in list(self._tasks.items()):
            if request_id not in self._drawing:
                task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=seconds)
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _engine_of(self, sample: messages.Sample) -> messages.SamplingEngine:
        return sample.sampler.engine or self._default

    # --- one sample

    async def _answer(
        self,
        operation: Operation,
        sample: messages.Sample,
        model: BaseModel,
        only: bool,
        outcome: Outcome,
    ) -> None:
        """`only`: not by the engine, whatever happens."""
        try:
            output = await self._drawn(operation, sample, model, only)
        except EndpointError as error:
            if only or isinstance(error, StreamBroken):
                category: Literal["user", "server"] = "user" if isinstance(error, CannotServe) else "server"
                outcome.fail([operation], error.message, category)
                return
            log.debug("%s is sampled by the engine: %s", operation.request_id, error.message)
            _give_seed(operation, sample)
            outcome.send_to_engine(operation)
        except Exception as error:
            what = internal_error("a sample on an SGLang server", error)
            outcome.fail([operation], what, "server")
        else:
            outcome.on_answer(messages.Done(operation.request_id, output))

    async def _drawn(
        self, operation: Operation, sample: messages.Sample, model: BaseModel, only: bool
    ) -> messages.SampleOutput:
        """Raises EndpointError if no server does it."""
        until = time.monotonic() + self._patience
        refused: dict[Registered, tuple[int, EndpointError]] = {}  # in which life, and why
        deaths = 0
        why: EndpointError = EndpointBusy(f"no SGLang server of {model.name!r} is in use")
        remote = RemoteSample(operation.request_id, sample, model, self._on_drawn)
        while True:
            endpoint = await self._pick(operation.owner, sample, model, refused, only)
            if endpoint is None:
                if not only or time.monotonic() >= until:
                    raise why
                await self._endpoints.change(_WAIT_SECONDS)
                continue
            life = endpoint.life
            self._drawing.add(remote.request_id)
            try:
                output = await self._at(endpoint, remote)
            except EndpointError as error:
                log.debug("%s does not sample %s: %s", endpoint.client.url, remote.request_id, error.message)
                if remote.told:
                    raise StreamBroken(f"the stream cannot go on: {error.message}") from None
                why = error
                if isinstance(error, EndpointDied):
                    if endpoint.life == life:
                        self._endpoints.failed(endpoint, error)
                    deaths, until = deaths + 1, time.monotonic() + self._patience
                    if deaths >= _DEATHS:
                        raise
                elif isinstance(error, EndpointBusy) and only and time.monotonic() < until:
                    await asyncio.sleep(_WAIT_SECONDS)
                else:
                    refused[endpoint] = life, error
            else:
                endpoint.answered += 1
                self._on_answered(endpoint, sample, output)
                return output
            finally:
                self._drawing.discard(remote.request_id)

    async def _pick(
        self,
        owner: str,
        sample: messages.Sample,
        model: BaseModel,
        refused: dict[Registered, tuple[int, EndpointError]],
        only: bool,
    ) -> Registered | None:
        """A healthy server that has, or can get, the weights. Raises why those that there are do not."""
        for endpoint in self._endpoints.unchecked(owner):
            await endpoint.checked.wait()
        reasons: list[EndpointError] = []
        for endpoint in self._endpoints.of(model.name, owner):
            if endpoint.weights not in (None, sample.sampler.weights):
                continue
            life, error = refused.get(endpoint, (0, None))
            if error is not None and life == endpoint.life:
                reasons.append(error)
            elif (found := why_not(sample, model, endpoint.limits, only)) is not None:
                reasons.append(CannotServe(found))
            else:
                return endpoint
        if reasons:
            raise reasons[0]
        return None

    async def _at(self, endpoint: Registered, remote: RemoteSample) -> messages.SampleOutput:
        """With the weights that the sample is of, or not at all. Raises EndpointError."""
        sampler = remote.sample.sampler
        async with endpoint.sampling():
            if not endpoint.healthy or endpoint.weights not in (None, sampler.weights):
                raise EndpointBusy(f"{endpoint.client.url} has other weights now")
            version = endpoint.weight_version
            if endpoint.weights == sampler.weights:
                return await endpoint.while_up(remote.draw(endpoint, None, version))
            for is_last in (False, True):
                name = await endpoint.while_up(self._adapters.ensure(endpoint, sampler))
                try:
                    return await endpoint.while_up(remote.draw(endpoint, name, version))
                except EndpointRefused as error:
                    if is_last or name not in error.detail:
                        raise
                    self._adapters.lost(endpoint, sampler)
            raise AssertionError


class StreamBroken(EndpointError):
    """Tokens were told of that nobody else can go on from."""


def _give_seed(operation: Operation, sample: messages.Sample) -> None:
    """So that an engine that begins a stream again draws the same, and what was told of it holds."""
    if sample.stream and sample.params.seed is None:
        params = msgspec.structs.replace(sample.params, seed=secrets.randbits(63))
        operation.changed = messages.encode(msgspec.structs.replace(sample, params=params))
