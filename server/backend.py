"""What stands behind the routers, put together once per application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from prometheus_client.core import Metric

from ..engine import messages
from .access.keys import ApiKeys, read_forever
from .access.quotas import Quotas
from .access.signed_urls import UrlSigner
from .access.tokens import Tokens
from .base_models import BaseModel, BaseModels
from .checkpoints.checkpoints import Checkpoints
from .checkpoints.copies import Copies
from .checkpoints.sweep import Sweep
from .disk import Disk
from .errors import BadRequest
from .ledger import base_models as base_model_rows
from .ledger import tenancy
from .ledger.ledger import Ledger, open_owned
from .models.admission import Admission
from .models.custom_losses import CustomLosses
from .models.live_samplers import LiveSamplers
from .models.named_models import NamedModels
from .models.refused_saves import RefusedSaves
from .models.runs import Runs
from .models.samplers import Samplers
from .models.sessions import Sessions
from .offload import Offload
from .operations.answers import KEPT
from .operations.completions import Completions
from .operations.operation import Operation, stream_of
from .operations.operations import Operations
from .operations.payloads import Payloads
from .operations.sample_streams import SampleStreams
from .plugins.rlve.runs import RlveRuns
from .plugins.sglang.distribution import Distribution
from .plugins.sglang.divergence import Divergence
from .plugins.sglang.endpoints import Endpoints
from .plugins.sglang.registry import Registry
from .plugins.sglang.sampling import Sampling
from .plugins.wandb import WandbRuns
from .settings import Settings
from .supervision.supervisor import Supervisor

log = logging.getLogger("tinsmith.server")

# What a worker takes by itself, and, as Python's objects, for each byte of a body of JSON.
_WORKER_BYTES = 1 << 30
_MEMORY_PER_BODY_BYTE = 16


@dataclass(eq=False)
class Backend:
    settings: Settings
    base_models: BaseModels
    keys: ApiKeys
    quotas: Quotas
    admission: Admission
    signer: UrlSigner
    tokens: Tokens
    opened: Ledger | None = None  # the ledger, if it has been opened already
    ledger: Ledger = field(init=False)
    payloads: Payloads = field(init=False)
    disk: Disk = field(init=False)
    engine: Supervisor = field(init=False)
    operations: Operations = field(init=False)
    completions: Completions = field(init=False)
    custom_losses: CustomLosses = field(init=False)
    refused_saves: RefusedSaves = field(init=False)
    runs: Runs = field(init=False)
    wandb: WandbRuns = field(init=False)
    sessions: Sessions = field(init=False)
    named_models: NamedModels = field(init=False)
    samplers: Samplers = field(init=False)
    rlve: RlveRuns = field(init=False)
    endpoints: Endpoints = field(init=False)
    distribution: Distribution = field(init=False)
    registry: Registry = field(init=False)
    sampling: Sampling = field(init=False)
    divergence: Divergence = field(init=False)
    live_samplers: LiveSamplers = field(default_factory=LiveSamplers)
    checkpoints: Checkpoints = field(init=False)
    sweep: Sweep = field(init=False)
    copies: Copies = field(init=False)
    streams: SampleStreams = field(default_factory=SampleStreams)
    offload: Offload = field(init=False)
    _background: list[asyncio.Task] = field(default_factory=list)
    stopped: bool = False
    _draining: bool = False

    async def start(self) -> None:
        """Opens the ledger, starts the engine without waiting for it, takes up what was unfinished."""
        settings = self.settings
        self.ledger = self.opened or open_owned(
            settings.data_dir, settings.ledger_url, settings.sync_every_commit
        )
        self.offload = Offload(_WORKER_BYTES + _MEMORY_PER_BODY_BYTE * settings.max_body_bytes)
        self.payloads = Payloads(self.ledger, settings.payload_dir, settings.sync_every_commit)
        self.disk = Disk(settings.data_dir, settings.disk_reserve_bytes, settings.payload_dir.parent)
        self.engine = Supervisor(
            settings.engine_config(
                [model.message(settings.is_loopback) for model in self.base_models.values()]
            ),
            self._answered,
            settings.engine_silence_seconds,
            inherited=() if self.ledger.owner is None else self.ledger.owner.descriptors,
            load=self.payloads.load,
        )
        self.operations = Operations(self.ledger, self.engine, self.disk, self.payloads)
        self.completions = Completions(self.ledger, self.operations)
        self.custom_losses = CustomLosses(
            self.ledger, self.operations, self.quotas, settings.custom_loss_server_side
        )
        self.runs = Runs(
            self.ledger,
            self.engine,
            self.operations,
            self.payloads,
            settings,
            self.quotas,
            self.base_models,
        )
        self.refused_saves = RefusedSaves(self.runs.unused_numbers.consume, settings.refused_save_seconds)
        self.wandb = WandbRuns(settings.data_dir / "wandb", settings.wandb_mode, self.runs.known)
        self.operations.on_finished = self._operation_finished
        self.rlve = RlveRuns(self)
        self.runs.on_created, self.runs.on_ending = self.rlve.created, self.rlve.end
        self.runs.on_finished = self._model_finished
        self.samplers = Samplers(
            self.ledger,
            self.engine,
            self.operations,
            self.runs,
            settings,
            self.quotas,
            self.base_models,
        )
        self.endpoints = Endpoints(self.base_models)
        self.registry = Registry(settings, self.ledger, self.endpoints)
        self.distribution = Distribution(
            settings, self.keys, self.engine, self.disk, self.endpoints, self.base_models
        )
        self.samplers.on_removed = self.distribution.adapters.removed
        self.sampling = Sampling(
            self.operations,
            self.endpoints,
            self.distribution.adapters,
            self.base_models,
            settings.sampling_engine,
            settings.sglang_patience_seconds,
            self.streams.add,
        )
        fraction = settings.sglang_compared_percent / 100
        self.divergence = Divergence(self.engine, self.endpoints, fraction)
        self.sampling.on_answered = self.divergence.answered
        self.sessions = Sessions(
            self.ledger, self.runs, self.samplers, self.quotas, settings.session_idle_seconds
        )
        self.named_models = NamedModels(self.runs, self.sessions, self.operations, self.admission)
        self.sweep = Sweep(self.ledger, self.engine, self.runs.snapshots, self.payloads, settings)
        self.sweep.on_removed = self.distribution.adapters.removed
        self.checkpoints = Checkpoints(self.ledger, self.sweep, self.base_models)
        self.copies = Copies(self.ledger, self.disk, self.quotas, settings.data_dir)
        if moved := await self.payloads.move_old(stream_of, KEPT):
            log.info("%d payloads of an older ledger have their new place", moved)
        digests = {name: model.digest for name, model in self.base_models.items() if model.digest}
        await self.ledger.write(partial(base_model_rows.record, digests=digests))
        await self.copies.take_up()
        await self.keys.read(self.ledger)
        await self.quotas.read(self.ledger)
        for owner in self.keys.owners:
            await self.ledger.write(partial(tenancy.ensure_tenant, tenant=owner))
        await self.engine.start()
        await self.registry.start()
        await self.runs.resume()
        self.admission.take_up(self.operations.unanswered())
        await self.rlve.take_up()
        forever = (
            read_forever(self.ledger, self.keys, self.quotas),
            self.samplers.sweep_forever(),
            self.sweep.sweep_forever(),
            self.sessions.rest_silent_forever(),
        )
        self._background = [asyncio.ensure_future(each) for each in forever]

    def _answered(self, answer: messages.Done | messages.Failed | messages.Drawn) -> None:
        if isinstance(answer, messages.Drawn):
            self.streams.add(answer)
        else:
            self.operations.on_answer(answer)

    def _operation_finished(self, operation: Operation) -> None:
        self.admission.answered(operation)
        self.wandb.answered(operation)

    def _model_finished(self, model_id: str) -> None:
        self.wandb.finish(model_id)
        self.live_samplers.forget(model_id)

    async def drain(self) -> None:
        """Refuses submits, saves the models' states behind the work that is queued, ends the engine."""
        self._draining = True
        await self.rlve.close()
        if self.engine.ready.is_set():
            log.info("finishing the work that is queued and saving the models")
            self.engine.refuse_submits()
            await self.runs.save_all()
        await self.sampling.finish(self.settings.stop_patience_seconds)
        await self.engine.stop(self.settings.stop_patience_seconds)
        await self.operations.settle()
        await self.wandb.close()
        self.stopped = True
        self.operations.wake_all()
        self.completions.wake_all()

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        self.refused_saves.close()
        self.offload.close()
        if not self._draining:
            await self.drain()
        await self.distribution.close()
        await self.endpoints.close()
        self.registry.close()
        self.payloads.close()
        self.ledger.close()

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        yield from self.divergence.collect()

    def base_model(self, name: str) -> BaseModel:
        """Raises BadRequest naming those there are."""
        try:
            return self.base_models[name]
        except KeyError:
            known = ", ".join(sorted(self.base_models)) or "none"
            raise BadRequest(f"base_model: unknown model {name!r}; this server has: {known}") from None
