"""Metrics of models as runs of Weights & Biases, for clients that ask for it.

The library is optional (`pip install "wandb>=0.25"`). A client's key is in memory only, for the library's
own use: not in the ledger, not in a log, not on disk. Without one, also after the server's restart, a run is
written below the data directory as W&B's offline runs are (`wandb sync` uploads them). What W&B does or fails
to do is no concern of the training.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ...engine import messages
from ..errors import BadRequest
from ..models.run import WANDB, Run
from ..operations.operation import Operation

log = logging.getLogger("tinsmith.wandb")

Mode = Literal["online", "offline", "disabled"]
_MOST_WAITING = 10_000  # steps, while the library waits for its servers
_LAST_SECONDS = 20.0  # for what is left when the server stops


class WandbRuns:
    """One thread talks to the library: nothing here waits for it, but `close`."""

    def __init__(self, directory: Path, mode: Mode, find: Callable[[str], Run | None]):
        self._directory, self._mode, self._find = directory, mode, find
        self._keys: dict[str, str] = {}
        self._since_step: dict[str, dict[str, float]] = {}  # sums of metrics, by model
        self._open: dict[str, Any] = {}  # of the thread
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # A daemon: what waits for W&B's servers does not keep this one from its end.
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises BadRequest where no run can be written."""
        if self._mode == "disabled":
            raise BadRequest("wandb_config.enabled: this server does not write to Weights & Biases")
        if importlib.util.find_spec("wandb") is None:
            raise BadRequest(
                "wandb_config.enabled: this server is without wandb; its operator can install it"
            )

    def remember(self, model_id: str, key: str) -> None:
        """The key of the model's client, until the model or the server ends."""
        self._keys[model_id] = key

    def answered(self, operation: Operation) -> None:
        """Each operation of a model comes here once, with its answer, in their order."""
        run = self._find(operation.model_id) if operation.model_id else None
        answer = operation.answer
        if run is None or WANDB not in run.configuration or not isinstance(answer, messages.Done):
            return
        match answer.output:
            case messages.ForwardBackwardOutput(metrics=metrics) if operation.kind == "forward_backward":
                sums = self._since_step.setdefault(run.id, {})
                for name, value in metrics.items():
                    if name.endswith(":sum"):
                        sums[name] = sums.get(name, 0.0) + value
                    else:
                        sums[name] = value
            case messages.OptimStepOutput(metrics=metrics):
                whole = self._since_step.pop(run.id, {}) | metrics
                if whole.get("valid_tokens:sum"):
                    whole["loss:mean"] = whole["loss:sum"] / whole["valid_tokens:sum"]
                if self._work.qsize() < _MOST_WAITING:
                    self._work.put(partial(self._log, run, whole))
                else:
                    log.warning("metrics of model %s are lost: W&B does not keep up", run.id)

    def tell(self, model_id: str, metrics: dict[str, float]) -> None:
        """Of the model's next step, from elsewhere."""
        run = self._find(model_id)
        if run is not None and WANDB in run.configuration:
            self._since_step.setdefault(model_id, {}).update(metrics)

    def finish(self, model_id: str) -> None:
        """Nothing more will come of the model."""
        self._keys.pop(model_id, None)
        self._since_step.pop(model_id, None)
        self._work.put(partial(self._finish, model_id))

    async def close(self) -> None:
        """Wait until everything is written, for a while."""
        self._work.put(self._finish_all)
        self._work.put(None)
        await asyncio.to_thread(self._thread.join, _LAST_SECONDS)

    # --- in the thread

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def _log(self, run: Run, metrics: dict[str, float]) -> None:
        try:
            if run.id not in self._open:
                self._open[run.id] = self._begin(run)
            self._open[run.id].log(metrics)
        except Exception as error:  # whatever the library may raise, without what it was told
            log.warning("metrics of model %s did not get to W&B: %s", run.id, type(error).__name__)

    def _begin(self, run: Run) -> Any:
        import wandb

        asked, key = run.configuration[WANDB], self._keys.get(run.id)
        self._directory.mkdir(parents=True, exist_ok=True)
        found = wandb.init(
            project=asked["project"],
            name=asked.get("run_name"),
            group=asked.get("group"),
            id=hashlib.sha256(run.id.encode()).hexdigest()[:16],
            dir=str(self._directory),
            mode="online" if self._mode == "online" and key is not None else "offline",
            resume="allow",
            reinit="create_new",
            config={"model_id": run.id, "base_model": run.base_model, "lora": run.lora},
            settings=wandb.Settings(
                api_key=key,
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                disable_job_creation=True,
                x_disable_stats=True,  # of this machine, which is not the client's
                x_disable_meta=True,
                x_save_requirements=False,
            ),
        )
        found.define_metric("*", step_metric="optimizer_step")
        return found

    def _finish(self, model_id: str) -> None:
        if (run := self._open.pop(model_id, None)) is not None:
            try:
                run.finish()
            except Exception as error:
                log.warning("the run of model %s was not finished: %s", model_id, type(error).__name__)

    def _finish_all(self) -> None:
        for model_id in list(self._open):
            self._finish(model_id)
