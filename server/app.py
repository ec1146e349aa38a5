"""The application: `create_app(settings)`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from .. import __version__
from .access.keys import ApiKeys
from .access.quotas import Quotas
from .access.signed_urls import UrlSigner
from .access.tokens import Tokens
from .backend import Backend
from .base_models import BaseModel, BaseModels, plan
from .http import errors, openapi
from .http.authentication import Authentication
from .http.body_limits import USUAL_BYTES, BodyLimits, budget, of_training_and_sampling
from .http.browsers import AllowedHosts, BrowserChecks
from .http.json_bodies import JsonBodies
from .http.metrics import Measured, Metrics
from .http.refused_numbers import RefusedNumbers
from .http.request_ids import RequestIds
from .http.routes import (
    accounts,
    checkpoints,
    credentials,
    custom_losses,
    downloads,
    engine_info,
    futures,
    generate,
    imports,
    inference,
    models,
    openai,
    rlve,
    sampler_weights,
    sampling,
    sampling_sessions,
    service,
    session_search,
    sessions,
    sleep,
    sync,
    traces,
    training,
    training_runs,
    weights,
)
from .ledger.ledger import Ledger
from .models.admission import Admission
from .settings import Settings


def create_app(
    settings: Settings, base_models: list[BaseModel] | None = None, ledger: Ledger | None = None
) -> FastAPI:
    """`base_models` defaults to resolving `settings.model`, `ledger` to opening it at the start."""
    if base_models is None:
        planned = plan(settings.model, settings.dtype, settings.mesh)
        base_models = [each.obtain(settings.cache_dir, settings.max_sequence_length) for each in planned]
    keys = ApiKeys(settings.api_keys)
    quotas = Quotas(settings)
    admission = Admission(quotas)
    signer = UrlSigner(settings.data_dir, settings.signed_url_seconds)
    known = BaseModels({model.name: model for model in base_models})
    tokens = Tokens(signer, settings.token_seconds)
    backend = Backend(settings, known, keys, quotas, admission, signer, tokens, ledger)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await backend.start()
        yield
        await backend.close()

    app = FastAPI(title="Tinsmith", version=__version__, lifespan=lifespan)
    app.state.backend = backend
    # Routes are looked through in this order: what is asked most often comes first.
    for module in (
        *(futures, service, training, sampling, generate, openai, sessions, models, weights),
        *(
            sampler_weights,
            sampling_sessions,
            training_runs,
            checkpoints,
            downloads,
            session_search,
            traces,
            accounts,
            credentials,
            imports,
            custom_losses,
            inference,
            sync,
            engine_info,
            sleep,
            rlve,
        ),
    ):
        app.include_router(module.router)
    errors.install(app)
    openapi.install(app)
    app.state.metrics = Metrics()
    app.state.metrics.registry.register(backend)
    app.add_middleware(JsonBodies)
    app.add_middleware(Measured, metrics=app.state.metrics)
    # The last one added is the first to see a request.
    own = of_training_and_sampling(settings.max_body_bytes) | {imports.PATH: settings.max_import_bytes}
    app.add_middleware(
        BodyLimits,
        usual=min(USUAL_BYTES, settings.max_body_bytes),
        own=own,
        budget=budget(settings.max_body_bytes),
        streamed=[imports.PATH],
    )
    app.add_middleware(RefusedNumbers, backend=backend)
    app.add_middleware(Authentication, keys=keys, tokens=tokens, admission=admission, signer=signer)
    app.add_middleware(BrowserChecks, keys=keys, hosts=AllowedHosts(settings.own_hosts))
    app.add_middleware(errors.Unhandled)
    app.add_middleware(RequestIds)
    return app
