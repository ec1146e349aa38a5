"""The application: `create_app(settings)` puts it together.

`Application.build` makes every object once, each from the objects above it. Routes get theirs by type
(`http/dependencies.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from .. import __version__
from .access import ApiKeys, Quotas, Tokens, UrlSigner, read_forever
from .base_models import BaseModel, BaseModels, plan
from .checkpoints import Checkpoints, Copies
from .checkpoints.sweep import Sweep
from .files import Disk
from .http import errors, openapi
from .http.bodies import USUAL_BYTES, BodyLimits, budget, of_training_and_sampling
from .http.browser_checks import AllowedHosts, BrowserChecks
from .http.dependencies import Services
from .http.gate import Gate
from .http.model_creations import ModelCreations
from .http.monitoring import (
    Metrics,
    Overview,
    ServerMetrics,
)
from .http.routes import (
    checkpoints,
    console,
    futures,
    generate,
    inference,
    openai,
    sampling,
    service,
    sessions,
    training,
    weights,
)
from .http.sample_targets import SampleTargets
from .http.samples import ApiSamples, ServedSamples
from .ledger import tenancy
from .ledger.ledger import Ledger, open_owned
from .models.adapter_imports import AdapterImports
from .models.losses import CustomLosses
from .models.recovery import Recovery, Snapshots
from .models.run import KnownRuns
from .models.runs import Runs
from .models.samplers import LiveSamplers, Samplers
from .models.saves import Saves
from .models.sessions import NamedModels, Sessions
from .models.submits import Admission, RefusedSaves, SampleSubmits, Submits, UnusedNumbers
from .offload import Offload
from .operations.answers import KEPT, SAVES
from .operations.metrics import OperationMetrics
from .operations.operation import Dispatcher
from .operations.operations import Operations
from .operations.payloads import Payloads
from .operations.sample_streams import Completions, SampleStreams
from .plugins.rlve.driver import TrainingClient
from .plugins.rlve.runs import RlveRuns
from .plugins.sglang.endpoints import Endpoints, Registry
from .plugins.sglang.merged_weights import Distribution
from .plugins.sglang.sampling import Divergence, Sampling
from .plugins.wandb import WandbRuns
from .settings import Settings
from .supervision.supervisor import Supervisor, WarmUp

log = logging.getLogger("tinsmith.server")

# Memory of a worker process: its own, and that of the Python objects made from each byte of a JSON body.
_WORKER_BYTES = 1 << 30
_MEMORY_PER_BODY_BYTE = 16


def create_app(
    settings: Settings, base_models: list[BaseModel] | None = None, ledger: Ledger | None = None
) -> FastAPI:
    """Create the application.

    `base_models` defaults to resolving `settings.model`, `ledger` to opening it at the start.
    """
    if base_models is None:
        planned = plan(settings.model, settings.dtype, settings.mesh)
        base_models = [each.obtain(settings.cache_dir, settings.max_sequence_length) for each in planned]
    application = Application(settings, BaseModels({model.name: model for model in base_models}), ledger)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await application.start()
        yield
        await application.close()

    app = FastAPI(title="Tinsmith", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.application = application
    app.state.services = application.services
    # Routes are matched in this order: the most frequent come first.
    for router in (
        *(futures.router, service.router, training.router, sampling.router, generate.router, openai.router),
        *(sessions.router, sessions.model_router, weights.router, checkpoints.run_router, checkpoints.router),
        *(checkpoints.download_router, console.trace_router, console.account_router, console.key_router),
        *(inference.router, service.served_router, service.engine_router, console.router),
    ):
        app.router.routes.extend(router.routes)  # `include_router` would match each request once more
    errors.install(app)
    openapi.install(app)
    own = of_training_and_sampling(settings.max_body_bytes) | {weights.IMPORT_PATH: settings.max_import_bytes}
    app.add_middleware(
        Gate,
        keys=application.keys,
        tokens=application.tokens,
        signer=application.signer,
        browsers=BrowserChecks(AllowedHosts(settings.own_hosts)),
        admission=application.admission,
        limits=BodyLimits(
            usual=min(USUAL_BYTES, settings.max_body_bytes),
            own=own,
            budget=budget(settings.max_body_bytes),
            streamed=[weights.IMPORT_PATH],
        ),
        services=application.services,
        metrics=application.metrics,
        scrape_token=settings.metrics_token,
    )
    return app


class Application:
    """All objects of a server, from its start to its end.

    `opened` is the ledger, if it has been opened already.
    """

    def __init__(self, settings: Settings, base_models: BaseModels, opened: Ledger | None):
        self.settings = settings
        self.base_models = base_models
        self._opened = opened
        self.metrics = Metrics()
        self.keys = ApiKeys(settings.api_keys)
        self.quotas = Quotas(settings)
        self.admission = Admission(self.quotas)
        self.signer = UrlSigner(settings.data_dir, settings.signed_url_seconds)
        self.tokens = Tokens(self.signer, settings.token_seconds)
        self.services = Services()
        self.services.add((settings, base_models, self.metrics, self.keys, self.quotas, self.admission))
        self.services.add((self.signer, self.tokens))
        self._background: list[asyncio.Task] = []
        self._draining = False

    def build(self, ledger: Ledger) -> None:
        """Make everything that needs a ledger; nothing is started yet."""
        settings, base_models, quotas, admission = (
            self.settings,
            self.base_models,
            self.quotas,
            self.admission,
        )
        self.ledger = ledger
        self.offload = Offload(_WORKER_BYTES + _MEMORY_PER_BODY_BYTE * settings.max_body_bytes)
        self.payloads = Payloads(ledger, settings.payload_dir, settings.sync_every_commit)
        self.disk = disk = Disk(settings.data_dir, settings.disk_reserve_bytes, settings.payload_dir.parent)
        self.engine = Supervisor(
            settings.engine_config([model.message(settings.is_loopback) for model in base_models.values()]),
            settings.engine_silence_seconds,
            inherited=() if ledger.owner is None else ledger.owner.descriptors,
            load=self.payloads.load,
        )
        streams = SampleStreams()
        self.engine.drawn.subscribe(streams.add)

        # SGLang servers, which may draw samples in the engine's place.
        self.endpoints = Endpoints(base_models)
        self.registry = Registry(settings, ledger, self.endpoints)
        self.distribution = Distribution(settings, self.keys, self.engine, disk, self.endpoints, base_models)
        divergence = Divergence(self.engine, self.endpoints, settings.sglang_compared_percent / 100)
        self.metrics.registry.register(divergence)
        self.sampling = Sampling(
            self.endpoints,
            self.distribution.adapters,
            base_models,
            settings.sampling_engine,
            settings.sglang_patience_seconds,
            streams.add,
            divergence.answered,
        )

        # Operations and models.
        dispatcher = Dispatcher(settings.gap_grace_seconds)
        self.operations = Operations(
            ledger,
            self.engine,
            disk,
            self.payloads,
            dispatcher,
            OperationMetrics(self.metrics.registry, quotas),
            self.sampling,
        )
        self.completions = Completions(ledger, self.operations)
        known = KnownRuns()
        self.snapshots = Snapshots(ledger, self.engine, dispatcher, self.payloads, settings)
        recovery = Recovery(ledger, self.engine, self.operations, dispatcher, known, settings)
        self.runs = Runs(
            ledger,
            self.engine,
            self.operations,
            dispatcher,
            known,
            recovery,
            self.snapshots,
            quotas,
            base_models,
        )
        self.operations.finished.subscribe(admission.answered)
        removed = self.distribution.adapters.removed
        self.samplers = Samplers(
            ledger, self.engine, self.operations, self.runs, settings, quotas, base_models, removed
        )
        self.sessions = Sessions(ledger, self.runs, self.samplers, quotas, settings.session_idle_seconds)
        unused = UnusedNumbers(ledger, dispatcher, self.runs.numbered)
        self.refused_saves = RefusedSaves(unused, settings.refused_save_seconds)
        submits = Submits(self.runs, self.operations, dispatcher, admission, unused, self.refused_saves)
        saves = Saves(submits, self.operations, quotas, self.distribution)
        live_samplers = LiveSamplers(self.runs, self.samplers, saves, quotas)
        sample_submits = SampleSubmits(self.operations, admission, streams, self.sampling)
        custom_losses_ = CustomLosses(ledger, self.operations, quotas, settings.custom_loss_server_side)
        named_models = NamedModels(self.runs, self.sessions, self.operations, admission)

        # Checkpoints on disk.
        self.sweep = Sweep(
            ledger, self.engine, self.payloads, settings, self.snapshots.being_written, removed
        )
        checkpoints_ = Checkpoints(ledger, self.sweep, base_models)
        self.copies = Copies(ledger, disk, quotas, settings.data_dir)

        # Plugins that watch or train models.
        self.wandb = WandbRuns(
            settings.data_dir / "wandb", settings.wandb_mode, self.runs.known, self.operations.finished
        )
        self.runs.opened.subscribe(self.wandb.opened)
        self.spans: OperationSpans | None = None
        if settings.otlp_endpoint is not None:
            from .plugins.tracing import OperationSpans

            self.spans = OperationSpans(settings.otlp_endpoint)
            self.operations.finished.subscribe(self.spans.answered)
        self.operations.finished.subscribe(self.sweep.written, *SAVES, "save_unnamed_sampler")
        self.snapshots.written.subscribe(self.sweep.snapshot_written)
        self.metrics.registry.register(
            ServerMetrics(self.engine, self.operations, self.runs, recovery, ledger, disk, self.sweep)
        )
        overview = Overview(self.engine, self.operations, self.runs, disk, self.sweep)
        self.runs.finished.subscribe(self.wandb.finish)
        client = TrainingClient(
            ledger,
            self.operations,
            submits,
            sample_submits,
            self.samplers,
            live_samplers,
            self.wandb.tell,
        )
        self.rlve = RlveRuns(client, self.runs, base_models, settings.long_poll_seconds)

        # What routes share.
        targets = SampleTargets(base_models, ledger, self.runs, checkpoints_, self.samplers, live_samplers)
        served = ServedSamples(
            sample_submits,
            streams,
            targets,
            self.offload,
            settings.max_samples,
            settings.stream_keep_alive_seconds,
        )
        self.services.add((ledger, self.offload, disk, self.engine, streams, self.endpoints, self.registry))
        self.services.add((self.distribution, divergence, self.operations, self.completions, self.runs))
        self.services.add((self.samplers, self.sessions, unused, submits, saves, sample_submits))
        self.services.add((custom_losses_, named_models, self.sweep, checkpoints_, self.copies, self.wandb))
        self.services.add((self.rlve, targets, served, overview))
        self.services.add(
            (
                AdapterImports(
                    settings,
                    base_models,
                    ledger,
                    disk,
                    quotas,
                    admission,
                    self.sessions,
                    self.runs,
                    submits,
                    saves,
                ),
                ModelCreations(
                    settings,
                    base_models,
                    self.runs,
                    self.sessions,
                    named_models,
                    checkpoints_,
                    admission,
                    self.wandb,
                    self.rlve,
                ),
                ApiSamples(
                    targets,
                    sample_submits,
                    self.operations,
                    self.completions,
                    settings.max_samples,
                ),
                futures.OperationAnswers(
                    self.operations,
                    self.engine,
                    admission,
                    self.offload,
                    base_models,
                    settings.long_poll_seconds,
                ),
                training.Passes(settings, self.offload, self.operations, custom_losses_, self.runs, submits),
            )
        )

    async def start(self) -> None:
        """Open the ledger, start the engine without waiting for it, and resume unfinished work."""
        settings = self.settings
        self.build(
            self._opened or open_owned(settings.data_dir, settings.ledger_url, settings.sync_every_commit)
        )
        if moved := await self.payloads.move_old(KEPT):
            log.info("%d payloads of an older ledger were moved", moved)
        digests = {name: model.digest for name, model in self.base_models.items() if model.digest}
        await self.ledger.write(tenancy.record_digests, digests)
        await self.copies.take_up()
        await self.keys.read(self.ledger)
        await self.quotas.read(self.ledger)
        for owner in self.keys.owners:
            await self.ledger.write(tenancy.ensure_tenant, owner)
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
            self.disk.watch_forever(),
        )
        self._background = [asyncio.ensure_future(each) for each in forever]
        if settings.warm_up:
            rank = min(settings.warm_up_rank, settings.max_rank)
            warm_up = WarmUp(self.engine, list(self.base_models.values()), settings.data_dir, rank)
            self._background.append(asyncio.ensure_future(warm_up.run()))

    async def drain(self) -> None:
        """Refuse new submits, finish the queued work, save the models' states, and stop the engine."""
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
        if self.spans is not None:
            await self.spans.close()
        self.operations.wake_all()
        self.completions.wake_all()

    async def close(self) -> None:
        """End everything; drain first, unless that was done."""
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
