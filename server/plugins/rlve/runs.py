"""Training that the server runs itself: checking an `rlve_config`; starting, stopping, resuming and
describing runs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import Any

from sqlalchemy import Connection

from ...base_models import BaseModels
from ...errors import ApiError, BadRequest, internal_error
from ...ledger import plugins as plugin_rows
from ...models.run import RLVE, Run
from ...models.runs import Runs
from ...settings import Settings
from ...text import of_folder
from ...wire import requests as wire
from ...wire.requests import RlveConfig
from ...wire.training import check_loss
from .driver import Driver, Progress, TrainingClient, patiently
from .environments import Environments
from .rollouts import Difficulty, prompt

log = logging.getLogger("tinsmith.rlve")

_TOLD_STEPS = 100
_STALE_SECONDS = 12 * 3600.0  # answers are dropped after a day


class RlveRuns:
    """Starts and stops the training of models that the server trains.

    A client that stops one waits for at most `patience_seconds`.
    """

    def __init__(self, client: TrainingClient, runs: Runs, base_models: BaseModels, patience_seconds: float):
        self._client = client
        self._ledger = client.ledger
        self._runs = runs
        self._base_models = base_models
        self._patience_seconds = patience_seconds
        self._environments = Environments()
        self._drivers: dict[str, Driver] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        runs.created.subscribe(self._created)
        runs.ending.subscribe(self._end)

    async def difficulties(self, config: dict[str, Any], base_model: str) -> dict[str, Any]:
        """Return the initial difficulty of each environment. Raises BadRequest for an unusable one."""
        asked = RlveConfig.model_validate(config)
        tokenizer = await asyncio.to_thread(of_folder, self._base_models.named(base_model).folder)
        prompt("?", asked.custom_prompt_preprocessor, asked.answer_marker_type, tokenizer)
        begin = {}
        for name in dict.fromkeys(asked.environment_list):
            highest = await self._environments.highest_level(name)
            if asked.initial_difficulty > highest:
                raise BadRequest(
                    f"rlve_config.initial_difficulty: {asked.initial_difficulty} is over the highest of "
                    f"{name}, which is {highest}"
                )
            begin[name] = Difficulty(asked.initial_difficulty, highest).as_json()
        return begin

    def _created(self, run: Run) -> None:
        """Start the training of a new model that asks for it."""
        if (asked := run.configuration.get(RLVE)) is not None:
            self._begin(run, Progress(0, 0, _difficulties(asked["difficulties"])))

    async def take_up(self) -> None:
        """Continue, at the server's start, what was being trained."""
        for active in await self._ledger.read(plugin_rows.active_runs):
            run = await self._runs.find(active.owner, active.id)
            row = await self._ledger.read(plugin_rows.find_run, model_id=run.id)
            assert row is not None
            stale = time.time() - row.updated_at > _STALE_SECONDS
            progress = Progress(row.step, row.attempt + stale, _difficulties(row.difficulties))
            if stale:
                await self._change(run, attempt=progress.attempt)
            try:
                self._begin(run, progress)
            except BadRequest as error:  # the server was started without its base model
                await self._change(run, state="failed", message=error.message)
                continue
            if row.state == "stopping":
                self._drivers[run.id].stopping.set()

    async def stop(self, run: Run) -> None:
        """Stop the training before the next step, and wait for that for a while.

        Samples of the next step are dropped. Raises BadRequest for a model that the server does not train.
        """
        self._asked(run)
        driver, task = self._drivers.get(run.id), self._tasks.get(run.id)
        if driver is None or task is None:
            return
        await self._change(run, state="stopping")
        driver.stopping.set()
        await asyncio.wait({task}, timeout=self._patience_seconds)

    async def resume(self, run: Run) -> None:
        """Continue after the last recorded step. Raises BadRequest."""
        asked = RlveConfig.model_validate(self._asked(run)["config"])
        row = await self._ledger.read(plugin_rows.find_run, model_id=run.id)
        assert row is not None
        if run.id in self._drivers:
            if row.state == "stopping":
                raise BadRequest(f"model {run.name!r} is stopping: its step is being finished; try again")
            return
        if row.step >= asked.num_rollout:
            raise BadRequest(f"model {run.name!r} has finished all of its {asked.num_rollout} steps")
        progress = Progress(row.step, row.attempt + 1, _difficulties(row.difficulties))
        await self._change(run, state="running", attempt=progress.attempt, message=None)
        self._begin(run, progress)

    def _end(self, run: Run) -> None:
        """Stop the training of a model that has ended."""
        if (task := self._tasks.get(run.id)) is not None:
            task.cancel()

    async def described(self, run: Run) -> dict[str, Any]:
        """Describe the training, as get_info shows it."""
        config = RlveConfig.model_validate(self._asked(run)["config"])

        def read(connection: Connection) -> tuple[Any, list[dict[str, Any]]]:
            return plugin_rows.find_run(connection, run.id), plugin_rows.newest_steps(
                connection, run.id, _TOLD_STEPS
            )

        row, steps = await self._ledger.read(read)
        last = steps[-1] if steps else {}
        environments = {}
        for name, difficulty in _difficulties(row.difficulties).items():
            window = difficulty.window(config.difficulty_sliding_window_size)
            environments[name] = difficulty.as_json() | {"window": [window[0], window[-1]]}
        return {
            "state": "stopped"
            if run.state == "finished" and row.state in plugin_rows.ACTIVE_STATES
            else row.state,
            "message": row.message,
            "step": row.step,
            "num_rollout": config.num_rollout,
            "reward_mean": last.get("reward_mean"),
            "accuracy": last.get("accuracy"),
            "environments": environments,
            "steps": steps,
        }

    async def close(self) -> None:
        """Stop all training; the server's next start continues it."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._environments.close()

    def _asked(self, run: Run) -> dict[str, Any]:
        asked: dict[str, Any] | None = run.configuration.get(RLVE)
        if asked is None:
            raise BadRequest(f"model {run.name!r} was created without rlve_config.enabled")
        return asked

    def _begin(self, run: Run, progress: Progress) -> None:
        config = RlveConfig.model_validate(self._asked(run)["config"])
        self._drivers[run.id] = Driver(
            self._client, self._environments, self._base_models.named(run.base_model), run, config, progress
        )
        run.driven = True
        self._tasks[run.id] = asyncio.ensure_future(self._drive(run, self._drivers[run.id]))

    async def _drive(self, run: Run, driver: Driver) -> None:
        message = None
        try:
            state = "finished" if await driver.drive() else "stopped"
        except ApiError as error:
            state, message = "failed", error.message
        except Exception as error:
            state, message = "failed", internal_error(f"training {run.id}", error)
        finally:
            run.driven = False
            del self._drivers[run.id], self._tasks[run.id]
        log.info("model %s: its training is %s%s", run.id, state, f": {message}" if message else "")
        await self._runs.restart_numbers(run)  # a client that trains the model afterwards counts from 1
        await self._change(run, state=state, message=message)

    async def _change(self, run: Run, **values: Any) -> None:
        change = partial(plugin_rows.change_run, model_id=run.id, **values)
        await patiently(lambda: self._ledger.write(change))


def _difficulties(stored: dict[str, Any]) -> dict[str, Difficulty]:
    return {name: Difficulty(**values) for name, values in stored.items()}


# --- what an `rlve_config` asks for

LOSSES = ("importance_sampling", "ppo", "cispo", "policy_loss", "ppo_loss", "drgrpo", "stable_reinforce")
"""Losses that need only the log-probs and advantages of tokens."""
_NEED_REFERENCES = ("beta", "use_tis")


def rlve_of(
    body: wire.CreateModel, optimizer: str, settings: Settings, warnings: list[str]
) -> dict[str, Any] | None:
    """Check a new model's `rlve_config`; return what the model keeps of it, None without one. Raises
    BadRequest."""
    config = body.rlve_config
    if config is None or not config.enabled:
        return None
    if body.debug_train_only:
        raise BadRequest("rlve_config.enabled: a model of debug_train_only cannot be sampled from")
    if optimizer == "dimuon":
        raise BadRequest("rlve_config.enabled: the server cannot train with dimuon; choose adamw or muon")
    _check_config(config)
    if config.n_samples_per_prompt > settings.max_samples:
        raise BadRequest(
            f"rlve_config.n_samples_per_prompt: {config.n_samples_per_prompt} is over the limit of "
            f"{settings.max_samples}"
        )
    datums, most = config.rollout_batch_size * config.n_samples_per_prompt, settings.max_datums
    if body.max_batch_size is not None:
        most = min(most, body.max_batch_size)
    if datums > most:
        raise BadRequest(
            f"rlve_config: rollout_batch_size times n_samples_per_prompt is {datums}, over the {most} datums "
            "that the model takes at a time"
        )
    if not config.balance_data:
        warnings.append("rlve_config.balance_data: sequences are always packed by their lengths here")
    if config.partial_rollout:
        warnings.append("rlve_config.partial_rollout: every sample is finished in its own step here")
    if config.over_sampling_batch_size is not None and not config.use_dynamic_sampling_filter:
        warnings.append(
            "rlve_config.over_sampling_batch_size: without use_dynamic_sampling_filter every prompt is "
            "trained on, and no others are sampled"
        )
    return config.kept()


def _check_config(config: RlveConfig) -> None:
    if config.n_samples_per_prompt < 2:
        raise BadRequest("rlve_config.n_samples_per_prompt: a sample is compared with others; send 2 or more")
    if config.rollout_temperature == 0:
        raise BadRequest("rlve_config.rollout_temperature: at 0 all samples of a prompt are the same")
    check_loss(config.loss_fn, config.loss_config)
    if config.loss_fn not in LOSSES:
        raise BadRequest(
            f"rlve_config.loss_fn: {config.loss_fn} needs inputs that do not exist here; send one of "
            f"{', '.join(LOSSES)}"
        )
    for key in _NEED_REFERENCES:
        if config.loss_config.get(key):
            raise BadRequest(f"rlve_config.loss_fn_config: {key} needs log-probs of another model")
