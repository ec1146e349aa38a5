"""The driver of one model's training: a client that lives in the server.

A step saves the model's weights for sampling, samples groups, trains on them (`forward_backward`,
`optim_step`), and is recorded in the transaction that accepts its `optim_step`. All requests take the path of
clients' requests: the ledger accepts them, and they are admitted and counted as the owner's. Every operation
has a key made of the model, the step and the attempt, so one that is repeated after a kill is the first one.
A step that cannot continue starts again with the keys of the next attempt, without the gradients of the one
before.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from ....engine import messages
from ...base_models import BaseModel
from ...errors import ApiError, BadRequest, NotFound
from ...ledger import operations as operation_rows
from ...ledger import plugins as plugin_rows
from ...ledger import step_metrics
from ...ledger.ledger import Ledger
from ...ledger.operations import SampleNumber
from ...models.run import Run
from ...models.samplers import LiveSamplers, Sampler, Samplers, number_of, sampler_id
from ...models.submits import SampleSubmits, Submits
from ...operations.operation import Operation
from ...operations.operations import Operations
from ...wire.requests import RlveConfig
from ...wire.training import OptimStep
from .environments import Environments
from .rollouts import Difficulty, Draw, Group, Problems, answer, datums, differ, flat, of_step

T = TypeVar("T")
_UNREADABLE_SECONDS = 5.0


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """Call `ask` until the server accepts, waiting between tries as clients do."""
    while True:
        try:
            return await ask()
        except ApiError as error:
            if error.final:
                raise
            seconds = float(error.headers.get("Retry-After", 1))
        except OperationalError:  # the ledger cannot be read
            seconds = _UNREADABLE_SECONDS
        await asyncio.sleep(seconds)


_WAVES = 8  # waves of prompts to try, until enough groups have samples that differ


class _BeginAgainError(Exception):
    """The step cannot continue, because something it made is no longer available."""


@dataclass
class Progress:
    """The number of finished steps, and how often the next one was begun before (`attempt`, from 0)."""

    step: int
    attempt: int
    difficulties: dict[str, Difficulty]


@dataclass(frozen=True)
class TrainingClient:
    """The parts of the server that a driver uses where other clients send HTTP requests.

    `tell(model_id, metrics)` reports metrics of a model's next step.
    """

    ledger: Ledger
    operations: Operations
    submits: Submits
    sample_submits: SampleSubmits
    samplers: Samplers
    live_samplers: LiveSamplers
    tell: Callable[[str, dict[str, float]], None]


class Driver:
    """Runs the steps of one model."""

    def __init__(
        self,
        client: TrainingClient,
        environments: Environments,
        model: BaseModel,
        run: Run,
        config: RlveConfig,
        progress: Progress,
    ):
        self.run = run
        self.progress = progress
        self.stopping = asyncio.Event()
        self._client = client
        self._environments = environments
        self._config = config
        own = run.configuration.get("max_seq_len") or model.max_sequence_length
        longest = min(own, model.max_sequence_length)
        self._problems = Problems(config, environments, model.folder, longest)
        self._sampling: set[Operation] = set()
        self._sampler_now: Sampler | None = None

    async def drive(self) -> bool:
        """Run steps until all are done (True) or it is told to stop (False). Raises BadRequest."""
        await self._created()
        while self.progress.step < self._config.num_rollout:
            if self.stopping.is_set() and not await self._is_training():
                return False
            stopped = False
            try:
                stopped = not await self._step(self.progress.step + 1)
            except _BeginAgainError:
                self.progress.attempt += 1
                await self._write(
                    lambda db: plugin_rows.change_run(db, self.run.id, attempt=self.progress.attempt)
                )
            except BadRequest:
                await self._forget_sampler()
                raise
            await self._forget_sampler()
            if stopped:
                return False
        return True

    async def _created(self) -> None:
        creation = await self._client.operations.find(self.run.owner, self.run.create_message.request_id)
        assert creation is not None  # the ledger never drops creations
        await self._output(creation)

    async def _step(self, step: int) -> bool:
        groups = await self._sampled_unless_stopped(step)
        if groups is None:
            return False
        kept = [group for group in groups if self._is_wanted(group)][: self._config.rollout_batch_size]
        after = self._difficulties_after(groups)
        metrics = of_step(step, groups, len(kept), after)

        def count(connection: Connection) -> None:
            stored = {name: each.as_json() for name, each in after.items()}
            plugin_rows.add_step(connection, self.run.id, step, stored, metrics)

        if kept:
            metrics |= await self._train(kept, metrics, count)

            def write(db: Connection) -> None:
                plugin_rows.set_step_metrics(db, self.run.id, step, metrics)
                step_metrics.report(db, self.run.id, step, flat(metrics))

            await self._write(write)
        else:
            await self._write(count)
        self.progress = Progress(step, 0, after)
        return True

    # --- sampling

    async def _sampled_unless_stopped(self, step: int) -> list[Group] | None:
        sampling: asyncio.Task[list[Group]] = asyncio.ensure_future(self._sampled(step))
        stopped = asyncio.ensure_future(self.stopping.wait())
        try:
            # A step that has begun to train is finished, or its gradients would count for the next step.
            until = {sampling} if await self._is_training() else {sampling, stopped}
            await asyncio.wait(until, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            if not sampling.done():
                sampling.cancel()
        if not sampling.cancelling():
            return sampling.result()
        await asyncio.wait({sampling})
        for operation in self._sampling:
            self._client.operations.cancel(operation)
        return None

    async def _is_training(self) -> bool:
        key = self._key("forward_backward")
        find = partial(operation_rows.find_by_natural_key, natural_key=key)
        return await patiently(lambda: self._client.ledger.read(find)) is not None

    async def _sampled(self, step: int) -> list[Group]:
        """Sample the step's groups, in their order."""
        if self.progress.attempt:
            drop = messages.DropGradients("", self.run.id)
            await self._output(await self._operation("drop_gradients", drop))
        sampler = await self._sampler()
        groups: list[Group] = []
        for wave in range(_WAVES if self._config.use_dynamic_sampling_filter else 1):
            chosen = await self._problems.wave(self.progress.difficulties, step, wave)
            numbers = itertools.count(wave * self._config.wave)
            asked = [
                asyncio.ensure_future(self._group(sampler, next(numbers), draw, tokens))
                for draw, tokens in chosen
            ]
            try:
                groups += await asyncio.gather(*asked)
            finally:
                for each in asked:
                    each.cancel()
            if sum(map(self._is_wanted, groups)) >= self._config.rollout_batch_size:
                break
        return groups

    async def _sampler(self) -> Sampler:
        number = number_of(self.run.id, f"rlve:{self.progress.step + 1}:{self.progress.attempt}")
        identifier, key = sampler_id(self.run.session_id, number), self._key("save_unnamed_sampler")
        try:
            live = await patiently(lambda: self._client.live_samplers.save(self.run, identifier, key))
        except NotFound:
            raise _BeginAgainError from None
        self._sampler_now = live.sampler
        return live.sampler

    async def _forget_sampler(self) -> None:
        """Delete the step's sampler once its samples are there or no longer needed."""
        if self._sampler_now is not None:
            sampler, self._sampler_now = self._sampler_now, None
            await patiently(lambda: self._client.samplers.forget(sampler))

    async def _group(self, sampler: Sampler, number: int, draw: Draw, tokens: list[int]) -> Group:
        asked = messages.Sample(
            request_id="",
            sampler=sampler.ref,
            prompt=np.asarray(tokens, "<i4").tobytes(),
            num_samples=self._config.n_samples_per_prompt,
            params=messages.SamplingParams(
                max_tokens=self._problems.room(tokens),
                seed=draw.sampling_seed,
                temperature=self._config.rollout_temperature,
            ),
        )
        await self._client.samplers.sampled(sampler)
        named = SampleNumber(sampler.session_id, sampler.id, number)
        operation = await patiently(
            lambda: self._client.sample_submits.submit(self.run.owner, asked, named, None, self.run.dialect)
        )
        self._sampling.add(operation)
        try:
            output = await self._output(operation)
        finally:
            if operation.settled:
                self._sampling.discard(operation)
        assert isinstance(output, messages.SampleOutput)
        texts = [self._problems.tokenizer.decode(_ids(sequence.tokens)) for sequence in output.sequences]
        answers = [answer(text, self._config.answer_marker_type) for text in texts]
        scores = await self._environments.scores(draw.problem, answers)
        return Group(draw, tokens, output.sequences, scores)

    # --- what was sampled

    def _is_wanted(self, group: Group) -> bool:
        return not self._config.use_dynamic_sampling_filter or differ(group.rewards(self._config.reward_key))

    def _difficulties_after(self, groups: list[Group]) -> dict[str, Difficulty]:
        enough = self._config.min_prompts_before_difficulty_check * self._config.n_samples_per_prompt
        after = {}
        for name, difficulty in self.progress.difficulties.items():
            outcomes = [
                (group.draw.problem.level, len(group.scores), sum(group.right))
                for group in groups
                if group.draw.problem.environment == name
            ]
            after[name] = difficulty.counted(outcomes, enough, self._config.min_metric_to_increase_difficulty)
        return after

    # --- training

    async def _train(
        self, groups: list[Group], metrics: dict[str, Any], count: Callable[[Connection], None]
    ) -> dict[str, float]:
        """Train on the groups. `count` runs in the transaction that accepts the step."""
        data = [datum for group in groups for datum in datums(group, self._config.reward_key)]
        gradients = messages.ForwardBackward(
            "", self.run.id, data, self._config.loss_fn, self._config.loss_config
        )
        trained = await self._output(await self._operation("forward_backward", gradients))
        assert isinstance(trained, messages.ForwardBackwardOutput)
        self._client.tell(self.run.id, flat(metrics))
        step = OptimStep(model_id=self.run.id, learning_rate=self._config.learning_rate)
        message = step.message(self.run.id, self.run.configuration.get("steps"))
        reply = {"learning_rates": [message.params.learning_rate], "success": True, "info": {}}
        accepted = await self._operation("optim_step", message, reply, lambda db, _id: count(db))
        stepped = await self._output(accepted)
        assert isinstance(stepped, messages.OptimStepOutput)
        return {"loss": trained.metrics["loss:sum"], "grad_norm": stepped.metrics["grad_norm"]}

    async def _operation(
        self, kind: str, message: messages.ToEngine, reply: dict[str, Any] | None = None, also: Any = None
    ) -> Operation:
        key = self._key(kind)
        return await patiently(
            lambda: self._client.submits.submit(self.run, kind, None, message, reply, also, key=key)
        )

    def _key(self, kind: str) -> str:
        return f"rlve/{self.run.id}/{self.progress.step + 1}/{self.progress.attempt}/{kind}"

    async def _output(self, operation: Operation) -> messages.Output:
        """Wait for an operation's output. Raises BadRequest if it failed."""
        await operation.finished.wait()
        if operation.expired:
            raise _BeginAgainError
        if isinstance(operation.answer, messages.Failed):
            raise BadRequest(f"{operation.kind}: {operation.answer.message}")
        assert operation.answer is not None  # the driver ends before the server does
        return operation.answer.output

    async def _write(self, change: Callable[[Connection], None]) -> None:
        await patiently(lambda: self._client.ledger.write(change))


def _ids(tokens: bytes) -> list[int]:
    return np.frombuffer(tokens, "<i4").tolist()
