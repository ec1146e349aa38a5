"""The application: `create_app(settings)`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from .. import __version__
from . import errors
from .admission import Admission
from .auth import ApiKeys, Authentication, BodyLimit
from .backend import Backend
from .base_models import BaseModel, resolve
from .metrics import Measured, Metrics
from .quotas import Quotas
from .routers import checkpoints, futures, sampling, service, sessions, training
from .settings import Settings


def create_app(settings: Settings, base_models: list[BaseModel] | None = None) -> FastAPI:
    """`base_models` defaults to resolving `settings.model`."""
    if base_models is None:
        base_models = [
            resolve(entry, settings.cache_dir, settings.max_sequence_length) for entry in settings.model
        ]
    keys = ApiKeys(settings.api_keys)
    quotas = Quotas(settings)
    admission = Admission(quotas)
    backend = Backend(settings, {model.name: model for model in base_models}, keys, quotas, admission)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await backend.start()
        yield
        await backend.close()

    app = FastAPI(title="Tinsmith", version=__version__, lifespan=lifespan)
    app.state.backend = backend
    for module in (service, sessions, training, checkpoints, sampling, futures):
        app.include_router(module.router)
    errors.install(app)
    app.state.metrics = Metrics()
    app.add_middleware(Measured, metrics=app.state.metrics)
    # The last one added is the first to see a request.
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(Authentication, keys=keys, admission=admission)
    return app
