"""Metrics of models as runs of Weights & Biases, for clients that request it.

The library is optional (`pip install "wandb>=0.25"`). A client's key is only in memory, for the library's
use: not in the ledger, in a log or on disk. Without a key, which includes every model after a restart of the
server, the run is written below the data directory like W&B's offline runs (`wandb sync` uploads them).
Errors of W&B never affect the training.
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
from ..events import EventByKind
from ..models.run import WANDB, Run
from ..operations.operation import Operation

log = logging.getLogger("tinsmith.wandb")

Mode = Literal["online", "offline", "disabled"]
_MOST_WAITING = 10_000  # steps that wait while the library waits for its servers
_LAST_SECONDS = 20.0  # for what is left when the server stops


class WandbRuns:
    """Writes the metrics of models to W&B. One thread talks to the library, and only `close` waits for it."""

    def __init__(
        self,
        directory: Path,
        mode: Mode,
        find: Callable[[str], Run | None],
        finished: EventByKind[Operation],
    ):
        """`finished`: for operations that have their answers."""
        self._directory, self._mode, self._find = directory, mode, find
        self._finished = finished
        self._follows = False  # the answers of operations, from the first model on that wants it
        self._keys: dict[str, str] = {}
        self._since_step: dict[str, dict[str, float]] = {}  # sums of metrics, by model
        self._open: dict[str, Any] = {}  # used by the thread alone
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # A daemon, so that waiting for W&B's servers does not keep this server from stopping.
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise BadRequest if no run can be written."""
        if self._mode == "disabled":
            raise BadRequest("wandb_config.enabled: this server does not write to Weights & Biases")
        if importlib.util.find_spec("wandb") is None:
            raise BadRequest(
                "wandb_config.enabled: wandb is not installed on this server; its operator can install it"
            )

    def remember(self, model_id: str, key: str) -> None:
        """Keep the key of the model's client until the model or the server ends."""
        self._keys[model_id] = key

    def opened(self, run: Run) -> None:
        """Follow the answers of operations, if this is the first model whose metrics are written."""
        if WANDB in run.configuration and not self._follows:
            self._follows = True
            self._finished.subscribe(self.answered, "forward_backward", "optim_step")

    def answered(self, operation: Operation) -> None:
        """Log the metrics of an answered operation. Each comes once, in the order of the operations."""
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
        """Add metrics of the model's next step that come from outside the engine."""
        run = self._find(model_id)
        if run is not None and WANDB in run.configuration:
            self._since_step.setdefault(model_id, {}).update(metrics)

    def finish(self, model_id: str) -> None:
        """Finish the model's run."""
        self._keys.pop(model_id, None)
        self._since_step.pop(model_id, None)
        self._work.put(partial(self._finish, model_id))

    async def close(self) -> None:
        """Wait for a while until everything is written."""
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
        except (
            Exception
        ) as error:  # whatever the library may raise; not logged in full, because it may contain the key
            log.warning("metrics of model %s could not be sent to W&B: %s", run.id, type(error).__name__)

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
                x_disable_stats=True,  # statistics of this machine, which is not the client's
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
