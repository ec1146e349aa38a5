"""Decides who draws a sample: the engine, or an SGLang server that has its weights.

This is the only place where that is decided, for every route: `Operations.send` asks here before it sends
a sample to the engine, and what an SGLang server draws comes back like the engine's answers. The ledger
does not know the difference, so samples that were not answered when a server ended are done again after
the next start.

Some of the samples that SGLang drew, and the first one of every sampler, are scored by the engine too,
one at a time after they were answered. Of n tokens that SGLang drew with log-probs q, and to which the
engine gives p, `sampler/kl` is sum(q - p) / n, an estimate of the divergence KL(exp q || exp p) per token
(k1 of J. Schulman 2020, "Approximating KL divergence"), and `sampler/logprob_difference` the mean of |q -
p|. Only samples at temperature 1 and 0 are scored: their log-probs are untempered. A sleeping engine is
not woken for it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
import uuid
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec
import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ....engine import messages
from ...base_models import BaseModel
from ...errors import ApiError, BadRequest, internal_error
from ...operations.operation import Operation, Outcome
from ...supervision.supervisor import Supervisor
from .endpoint import CannotServe, EndpointBusy, EndpointDied, EndpointError, EndpointRefused
from .endpoints import Endpoints, Registered
from .requests import RemoteSample, why_not

log = logging.getLogger("tinsmith.inference")

_DEATHS = 3  # deaths of servers after which a sample fails
_WAIT_SECONDS = 1.0


class Adapters(Protocol):
    """The adapters on the servers, as sampling needs them."""

    async def ensure(self, endpoint: Registered, sampler: messages.SamplerRef) -> str:
        """Return the adapter's name on the server, loading it if necessary. Raises EndpointError."""

    def lost(self, endpoint: Registered, sampler: messages.SamplerRef) -> None:
        """Note that the server does not have the adapter."""


@dataclass(eq=False)
class Sampling:
    """Chooses who draws each sample.

    `default`: the sampling engine of samples that name none. `patience_seconds`: how long samples for SGLang
    alone wait for a server. `on_drawn` gets tokens of streams, `on_answered` the answers of servers.
    """

    endpoints: Endpoints
    adapters: Adapters
    base_models: dict[str, BaseModel]
    default: messages.SamplingEngine
    patience_seconds: float
    on_drawn: Callable[[messages.Drawn], None]
    on_answered: Callable[[Registered, messages.Sample, messages.SampleOutput], None]
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict, init=False)  # by request id
    _drawing: set[str] = field(default_factory=set, init=False)  # samples that a server is drawing

    # --- what is decided

    def check(self, owner: str, sample: messages.Sample) -> None:
        """Raise BadRequest, naming the field, for a sample that only SGLang may draw and never will."""
        if self._engine_of(sample) != "sglang":
            return
        model = self.base_models[sample.sampler.base_model]
        there = self.endpoints.all(model.name, owner)
        if not there and not self.endpoints.unchecked(owner):
            raise BadRequest(f"sampling_engine: no SGLang server is registered for {model.name!r}")
        known = [each.limits for each in there] or [None]
        reasons = [why_not(sample, model, limits, True) for limits in known]
        if all(reasons):
            raise BadRequest(f"{reasons[0]} (sampling_engine is sglang; `embedded` can do it)")

    def take(self, operation: Operation, sample: messages.Sample, outcome: Outcome) -> bool:
        """Draw the sample on an SGLang server; return False if it is for the engine.

        A sample that was once sent to the engine stays there.
        """
        if operation.request_id in self._tasks:
            return True
        engine = self._engine_of(sample)
        model = self.base_models.get(sample.sampler.base_model)
        there = model is not None and (
            self.endpoints.all(model.name, operation.owner) or self.endpoints.unchecked(operation.owner)
        )
        if operation.sent_in or model is None or engine == "embedded" or (engine == "auto" and not there):
            _give_seed(operation, sample)
            return False
        task = asyncio.ensure_future(self._answer(operation, sample, model, engine == "sglang", outcome))
        self._tasks[operation.request_id] = task
        task.add_done_callback(lambda _task: self._tasks.pop(operation.request_id, None))
        return True

    def cancel(self, operation: Operation) -> bool:
        """Stop drawing; return whether it was being drawn here. The SGLang server is told."""
        task = self._tasks.get(operation.request_id)
        if task is not None:
            task.cancel()
        return task is not None

    async def finish(self, seconds: float) -> None:
        """Wait for running samples, at most that long; the others stay unanswered in the ledger."""
        for request_id, task in list(self._tasks.items()):
            if request_id not in self._drawing:
                task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=seconds)
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _engine_of(self, sample: messages.Sample) -> messages.SamplingEngine:
        return sample.sampler.engine or self.default

    # --- one sample

    async def _answer(
        self, operation: Operation, sample: messages.Sample, model: BaseModel, only: bool, outcome: Outcome
    ) -> None:
        """Draw one sample and answer it. `only`: never leave it to the engine."""
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
        """Draw the sample, on several servers if necessary. Raises EndpointError if none can."""
        until = time.monotonic() + self.patience_seconds
        refused: dict[Registered, tuple[int, EndpointError]] = {}  # the server's life, and the reason
        deaths = 0
        why: EndpointError = EndpointBusy(f"no SGLang server of {model.name!r} is in use")
        remote = RemoteSample(operation.request_id, sample, model, self.on_drawn)
        while True:
            endpoint = await self._pick(operation.owner, sample, model, refused, only)
            if endpoint is None:
                if not only or time.monotonic() >= until:
                    raise why
                await self.endpoints.change(_WAIT_SECONDS)
                continue
            life = endpoint.life
            self._drawing.add(remote.request_id)
            try:
                output = await self._at(endpoint, remote)
            except EndpointError as error:
                log.debug("%s does not sample %s: %s", endpoint.client.url, remote.request_id, error.message)
                if remote.has_streamed:
                    raise StreamBroken(f"the stream cannot go on: {error.message}") from None
                why = error
                if isinstance(error, EndpointDied):
                    if endpoint.life == life:
                        self.endpoints.failed(endpoint, error)
                    deaths, until = deaths + 1, time.monotonic() + self.patience_seconds
                    if deaths >= _DEATHS:
                        raise
                elif isinstance(error, EndpointBusy) and only and time.monotonic() < until:
                    await asyncio.sleep(_WAIT_SECONDS)
                else:
                    refused[endpoint] = life, error
            else:
                endpoint.answered += 1
                self.on_answered(endpoint, sample, output)
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
        """Return a healthy server that has, or can get, the weights. Raises the reason why others cannot."""
        for endpoint in self.endpoints.unchecked(owner):
            await endpoint.checked.wait()
        reasons: list[EndpointError] = []
        for endpoint in self.endpoints.of(model.name, owner):
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
        """Draw on this server with exactly the sample's weights. Raises EndpointError."""
        sampler = remote.sample.sampler
        async with endpoint.sampling():
            if not endpoint.healthy or endpoint.weights not in (None, sampler.weights):
                raise EndpointBusy(f"{endpoint.client.url} has other weights now")
            version = endpoint.weight_version
            if endpoint.weights == sampler.weights:
                return await endpoint.while_up(remote.draw(endpoint, None, version))
            for is_last in (False, True):
                name = await endpoint.while_up(self.adapters.ensure(endpoint, sampler))
                try:
                    return await endpoint.while_up(remote.draw(endpoint, name, version))
                except EndpointRefused as error:
                    if is_last or name not in error.detail:
                        raise
                    self.adapters.lost(endpoint, sampler)
            raise AssertionError


class StreamBroken(EndpointError):
    """A stream has sent tokens that nobody else can continue."""


def _give_seed(operation: Operation, sample: messages.Sample) -> None:
    """Give a streamed sample a seed, so that an engine that starts it again draws the same tokens."""
    if sample.stream and sample.params.seed is None:
        params = msgspec.structs.replace(sample.params, seed=secrets.randbits(63))
        operation.changed = messages.encode(msgspec.structs.replace(sample, params=params))


# --- how far SGLang's log-probs are from the engine's

_REMEMBERED = 1000  # samplers
Weights = tuple[str, str | None]  # a base model, and the key of the weights on top of it


@dataclass
class Difference:
    """The sums of differences of log-probs, and their metrics."""

    tokens: int = 0
    sum: float = 0.0
    absolute: float = 0.0

    def add(self, sampled: np.ndarray, scored: np.ndarray) -> None:
        self.tokens += len(sampled)
        self.sum += float((sampled - scored).sum())
        self.absolute += float(np.abs(sampled - scored).sum())

    @property
    def metrics(self) -> dict[str, float]:
        count = max(1, self.tokens)
        return {
            "sampler/kl": self.sum / count,
            "sampler/logprob_difference": self.absolute / count,
            "sampler/tokens_compared": self.tokens,
        }


class Divergence:
    """Compares SGLang's log-probs with the engine's, for a `fraction` of the samples."""

    def __init__(self, engine: Supervisor, endpoints: Endpoints, fraction: float):
        self._engine = engine
        self._endpoints = endpoints
        self._fraction = fraction
        self._of_weights: OrderedDict[Weights, Difference] = OrderedDict()
        self._of_endpoint: defaultdict[tuple[str, str], Difference] = defaultdict(Difference)
        self._task: asyncio.Task[None] | None = None

    def of(self, base_model: str, weights: str | None) -> dict[str, float] | None:
        """Return the metrics of a sampler; None before any of its samples was compared."""
        found = self._of_weights.get((base_model, weights))
        return None if found is None else found.metrics

    def answered(self, endpoint: Registered, sample: messages.Sample, output: messages.SampleOutput) -> None:
        """Take a sample that SGLang has drawn, and perhaps compare it after it was answered."""
        is_new = (sample.sampler.base_model, sample.sampler.weights) not in self._of_weights
        chosen = self._fraction > 0 and (is_new or random.random() < self._fraction)
        busy = self._task is not None and not self._task.done()
        awake = self._engine.ready.is_set() and not self._engine.is_asleep
        if chosen and awake and not busy and sample.params.temperature in (0.0, 1.0):
            self._task = asyncio.ensure_future(self._compare(endpoint, sample, output.sequences[0]))

    async def _compare(
        self, endpoint: Registered, sample: messages.Sample, sequence: messages.SampledSequence
    ) -> None:
        sampled = np.frombuffer(sequence.logprobs, "<f4")[
            :-1
        ]  # the last token is left out, because a full context cannot be a prompt
        if not len(sampled):
            return
        scoring = messages.Sample(
            f"score-{uuid.uuid4().hex}",
            sample.sampler,
            sample.prompt + sequence.tokens[:-4],
            1,
            messages.SamplingParams(max_tokens=1, temperature=0.0, stop_tokens=[]),
            prompt_logprobs=True,
            prompt_logprobs_last_n=len(sampled),
        )
        try:
            answer = await self._engine.request(scoring)
        except ApiError:
            return
        if not isinstance(answer, messages.Done) or not isinstance(answer.output, messages.SampleOutput):
            log.debug("a sample could not be compared: %s", answer)
            return
        scored = np.frombuffer(answer.output.prompt_logprobs or b"", "<f4")[-len(sampled) :]
        base_model, weights = sample.sampler.base_model, sample.sampler.weights
        self._of_weights.setdefault((base_model, weights), Difference()).add(sampled, scored)
        self._of_weights.move_to_end((base_model, weights))
        while len(self._of_weights) > _REMEMBERED:
            self._of_weights.popitem(last=False)
        self._of_endpoint[base_model, _label(endpoint)].add(sampled, scored)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics for Prometheus."""
        labels = ["base_model", "endpoint"]
        up = GaugeMetricFamily("tinsmith_sglang_up", "SGLang servers in use", labels=labels)
        answered = CounterMetricFamily("tinsmith_sglang_samples", "Samples they answered", labels=labels)
        counts: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        for endpoint in self._endpoints.everybody():
            count = counts[endpoint.base_model or "", _label(endpoint)]
            count[0] += endpoint.healthy
            count[1] += endpoint.answered
        for place, (healthy, samples) in counts.items():
            up.add_metric(list(place), healthy)
            answered.add_metric(list(place), samples)
        yield up
        yield answered
        for name, text in (
            ("sampler/kl", "Mean of SGLang's log-probs less the trainer's, for the same tokens"),
            ("sampler/logprob_difference", "Mean absolute difference of these log-probs"),
            ("sampler/tokens_compared", "Tokens that were compared"),
        ):
            family = GaugeMetricFamily(f"tinsmith_{name.replace('/', '_')}", text, labels=labels)
            for place, difference in self._of_endpoint.items():
                family.add_metric(list(place), difference.metrics[name])
            yield family


def _label(endpoint: Registered) -> str:
    """Return the server's label. Tenants' servers are not named in metrics, which every tenant can read."""
    return endpoint.client.url if endpoint.owner is None else "a tenant's"
