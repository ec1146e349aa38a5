"""One sample on an SGLang server: its sequences, from the first request until the last has ended."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
from collections.abc import Callable
from typing import Any

from ....engine import messages
from ...base_models import BaseModel
from ...errors import BadRequest
from . import requests
from .endpoint import CannotServe, EndpointBusy, EndpointError, EndpointRefused
from .endpoints import Registered
from .requests import Drawing

Answer = dict[str, Any]
_attempts = itertools.count()  # a server refuses a request id that it has already
_aborting: set[asyncio.Task[None]] = set()


class RemoteSample:
    """`told`: whether anybody was told of its tokens, which then have to stay."""

    def __init__(
        self,
        request_id: str,
        sample: messages.Sample,
        model: BaseModel,
        on_drawn: Callable[[messages.Drawn], None],
    ):
        self.request_id = request_id
        self.sample = sample
        self.told = False
        self._model = model
        self._on_drawn = on_drawn

    async def draw(
        self, endpoint: Registered, lora: str | None, weight_version: str
    ) -> messages.SampleOutput:
        """All of it there, with the adapter upon the weights that it calls so. What the server is to have may
        change meanwhile. Raises EndpointError."""
        rid = f"{self.request_id}.{next(_attempts)}"
        under_way: set[str] = set()
        try:
            return await self._draw(endpoint, lora, weight_version, rid, under_way)
        except asyncio.CancelledError:
            if under_way:
                task = asyncio.ensure_future(_abort(endpoint, sorted(under_way)))
                _aborting.add(task)
                task.add_done_callback(_aborting.discard)
            raise

    async def _draw(
        self, endpoint: Registered, lora: str | None, weight_version: str, rid: str, under_way: set[str]
    ) -> messages.SampleOutput:
        assert endpoint.limits is not None
        sample, scores = self.sample, {}
        try:  # in a thread, for where there are stop strings this may read the tokenizer
            drawings = await asyncio.to_thread(requests.drawings, sample, self._model, endpoint.limits)
        except BadRequest as error:
            raise CannotServe(f"stop: {error.message}") from None
        bodies: dict[Any, dict[str, Any]] = {}
        if requests.scores_prompt(sample):
            bodies[None] = requests.prompt_body(sample, f"{rid}.prompt", lora)
        first: list[Answer] = []
        while unfinished := {i: each for i, each in enumerate(drawings) if each.reason is None}:
            for index, drawing in unfinished.items():
                seed = None if sample.params.seed is None else _seed(sample.params.seed, index)
                name = f"{rid}.{index}.{len(drawing.tokens)}"
                bodies[index] = requests.body(sample, drawing, name, lora, seed)
            under_way.update(body["rid"] for body in bodies.values())
            answers = await self._answers(endpoint, weight_version, bodies, drawings)
            under_way.clear()
            for answer in answers.values():
                _require_weights(answer, weight_version)
            if None in answers:
                scores = requests.prompt_scores(sample, answers.pop(None))
            first = first or list(answers.values())
            for index, answer in answers.items():
                drawings[index].take(answer, self._model.vocab_size)
            bodies = {}
        return requests.output(drawings, first, scores)

    async def _answers(
        self,
        endpoint: Registered,
        weight_version: str,
        bodies: dict[Any, dict[str, Any]],
        drawings: list[Drawing],
    ) -> dict[Any, Answer]:
        """By the keys of the bodies."""
        if self.sample.stream:
            asked = (
                self._streamed(
                    endpoint, weight_version, body, index, None if index is None else drawings[index]
                )
                for index, body in bodies.items()
            )
            return dict(zip(bodies, await asyncio.gather(*asked), strict=True))
        answers = await endpoint.client.generate(requests.together(list(bodies.values())))
        if len(answers) != len(bodies):
            raise EndpointRefused(f"{len(bodies)} requests have {len(answers)} answers")
        return dict(zip(bodies, answers, strict=True))

    async def _streamed(
        self,
        endpoint: Registered,
        weight_version: str,
        body: dict[str, Any],
        index: Any,
        drawing: Drawing | None,
    ) -> Answer:
        """The last part, which has all; of those before it is told."""
        last: Answer | None = None
        async for part in endpoint.client.stream(body):
            _require_weights(part, weight_version)
            last = part
            if drawing is None:
                continue
            meanwhile = Drawing(drawing.stops, [], drawing.topk)
            meanwhile.add(part, self._model.vocab_size)
            drawn = drawing.drawn(self.request_id, index, meanwhile)
            if drawn is not None:
                self.told = True
                self._on_drawn(drawn)
        if last is None:
            raise EndpointRefused("a stream has no parts")
        return last


def _seed(seed: int, index: int) -> int:
    """Of one of the sequences, which are to differ; SGLang's have 31 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}.{index}".encode()).digest()[:4]) >> 1


def _require_weights(answer: Answer, weight_version: str) -> None:
    """Raises EndpointBusy where any of it is of other weights."""
    meta = answer.get("meta_info") or {}
    versions = {each.get("version") for each in meta.get("weight_versions") or []}
    versions.add(meta.get("weight_version", weight_version))
    if versions != {weight_version}:
        drawn = str(sorted(map(str, versions)))[:256]
        raise EndpointBusy(f"it drew with weights {drawn}, not {weight_version!r}")


async def _abort(endpoint: Registered, rids: list[str]) -> None:
    """Who asked is gone."""
    for rid in rids:
        with contextlib.suppress(EndpointError):
            await endpoint.client.abort_request(rid)
