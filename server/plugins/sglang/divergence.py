"""How far SGLang's log-probs are from the trainer's, for the same tokens: `sampler/kl`.

Of a part of the samples that SGLang draws, and of every sampler's first one, a sequence is scored by the
engine too, as a prompt, one at a time and behind the answer. Of n tokens that SGLang drew with log-probs q,
and to which the engine gives p,

    sampler/kl = sum(q - p) / n,

an estimate of the divergence KL(exp q || exp p) per token (k1 of J. Schulman 2020, "Approximating KL
divergence"); and the mean of |q - p|, `sampler/logprob_difference`. Only of samples at temperature 1, and at
0: their log-probs are untempered. An engine that sleeps is not woken for it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ....engine import messages
from ...errors import ApiError
from ...supervision.supervisor import Supervisor
from .endpoints import Endpoints, Registered

log = logging.getLogger("tinsmith.inference")

_REMEMBERED = 1000  # samplers
Weights = tuple[str, str | None]  # a base model, and the key of what is on top of it


@dataclass
class Difference:
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
    """`fraction` of the samples are compared."""

    def __init__(self, engine: Supervisor, endpoints: Endpoints, fraction: float):
        self._engine = engine
        self._endpoints = endpoints
        self._fraction = fraction
        self._of_weights: OrderedDict[Weights, Difference] = OrderedDict()
        self._of_endpoint: defaultdict[tuple[str, str], Difference] = defaultdict(Difference)
        self._task: asyncio.Task[None] | None = None

    def of(self, base_model: str, weights: str | None) -> dict[str, float] | None:
        """The metrics of a sampler; None before any of its samples was compared."""
        found = self._of_weights.get((base_model, weights))
        return None if found is None else found.metrics

    def answered(self, endpoint: Registered, sample: messages.Sample, output: messages.SampleOutput) -> None:
        """SGLang has drawn it. Compares it, perhaps, behind the answer."""
        is_new = (sample.sampler.base_model, sample.sampler.weights) not in self._of_weights
        chosen = self._fraction > 0 and (is_new or random.random() < self._fraction)
        busy = self._task is not None and not self._task.done()
        awake = self._engine.ready.is_set() and not self._engine.is_asleep
        if chosen and awake and not busy and sample.params.temperature in (0.0, 1.0):
            self._task = asyncio.ensure_future(self._compare(endpoint, sample, output.sequences[0]))

    async def _compare(
        self, endpoint: Registered, sample: messages.Sample, sequence: messages.SampledSequence
    ) -> None:
        sampled = np.frombuffer(sequence.logprobs, "<f4")[:-1]  # a whole context is no prompt
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
        """For Prometheus."""
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
    """Every tenant sees the metrics: another's server is not named in them."""
    return endpoint.client.url if endpoint.owner is None else "a tenant's"
