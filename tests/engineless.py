"""The server without its routers and an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry
from sqlalchemy import Connection, text
from tinsmith.engine import messages
from tinsmith.server.access import Quotas
from tinsmith.server.base_models import BaseModels
from tinsmith.server.checkpoints import Checkpoints
from tinsmith.server.checkpoints.sweep import Sweep
from tinsmith.server.files import Disk
from tinsmith.server.ledger import operations, step_metrics, tenancy
from tinsmith.server.ledger.ledger import Ledger
from tinsmith.server.models.recovery import Recovery, Snapshots
from tinsmith.server.models.run import KnownRuns
from tinsmith.server.models.runs import Runs
from tinsmith.server.models.samplers import Samplers
from tinsmith.server.models.sessions import Sessions
from tinsmith.server.operations.metrics import OperationMetrics
from tinsmith.server.operations.operation import Dispatcher, SampleDrawer, Submission
from tinsmith.server.operations.operations import Operations
from tinsmith.server.operations.payloads import Payloads
from tinsmith.server.settings import Settings
from tinsmith.server.supervision.supervisor import Supervisor

DAY = 24 * 3600.0
MODEL = "s:train:0"
MakeDrawer = Callable[[Settings, Supervisor], SampleDrawer]


class Server:
    """A server without routers and engine, on one data directory; a second object is a new start."""

    def __init__(self, data_dir: Path, make_drawer: MakeDrawer | None = None, **settings):
        self.settings = Settings(data_dir=data_dir, **settings)
        self.ledger = Ledger(self.settings.ledger_url)
        self.payloads = Payloads(self.ledger, self.settings.payload_dir)
        self.engine = Supervisor(self.settings.engine_config([]), load=self.payloads.load)
        ledger, engine, payloads, settings = self.ledger, self.engine, self.payloads, self.settings
        self.quotas = Quotas(settings)
        base_models = BaseModels()
        drawer = None if make_drawer is None else make_drawer(settings, engine)
        dispatcher = Dispatcher(settings.gap_grace_seconds)
        metrics = OperationMetrics(CollectorRegistry(), self.quotas)
        self.operations = Operations(ledger, engine, Disk(data_dir, 0), payloads, dispatcher, metrics, drawer)
        known = KnownRuns()
        snapshots = Snapshots(ledger, engine, dispatcher, payloads, settings)
        recovery = Recovery(ledger, engine, self.operations, dispatcher, known, settings)
        self.runs = Runs(
            ledger,
            engine,
            self.operations,
            dispatcher,
            known,
            recovery,
            snapshots,
            self.quotas,
            base_models,
        )
        self.removed: list[str] = []
        on_removed = self.removed.append
        self.samplers = Samplers(
            ledger, engine, self.operations, self.runs, settings, self.quotas, base_models, on_removed
        )
        self.sessions = Sessions(ledger, self.runs, self.samplers, self.quotas, settings.session_idle_seconds)
        self.sweep = Sweep(ledger, engine, payloads, settings, snapshots.being_written, on_removed)
        self.checkpoints = Checkpoints(ledger, self.sweep, base_models)

    async def sample(self, number: int, tokens: int = 0, owner: str = "me") -> str:
        """A sample of so many tokens, answered; its request id."""
        operation = await self.operations.accept(sample(number, owner))
        sequence = messages.SampledSequence(bytes(4 * tokens), bytes(4 * tokens), "length")
        answer = messages.Done(operation.request_id, messages.SampleOutput([sequence]))
        self.operations.on_answer(answer)
        await operation.finished.wait()
        return operation.request_id

    async def age(self, seconds: float) -> None:
        """Everything was finished so much earlier."""
        await self.ledger.write(
            lambda connection: connection.execute(
                text("UPDATE operations SET finished_at = finished_at - :s"), {"s": seconds}
            )
        )


def sample(number: int, owner: str = "me") -> Submission:
    ref = messages.SamplerRef("tiny")
    return Submission(
        owner,
        "sample",
        f"sample/{number}",
        lambda request_id: messages.Sample(request_id, ref, b"", 1, messages.SamplingParams()),
    )


def add_metrics(
    connection: Connection, kind: str, number: int, metrics: dict[str, float], step: int | None
) -> None:
    """Metrics of an operation of the model, thinned as often as the server does."""
    operations.add_metrics(connection, MODEL, kind, number, metrics, step)
    if number % step_metrics.THIN_EVERY == 0:
        step_metrics.thin(connection, MODEL)


def model(connection: Connection, state: str = "ready", checkpoint: str | None = None) -> None:
    tenancy.ensure_tenant(connection, "me")
    tenancy.add_session(connection, id="s", owner="me", tags=[], user_metadata={})
    creation = messages.CreateModel("c", MODEL, "tiny", None, checkpoint=checkpoint)
    tenancy.add_model(
        connection,
        id=MODEL,
        owner="me",
        session_id="s",
        base_model="tiny",
        lora=None,
        optimizer={},
        user_metadata={},
        state=state,
        creation=messages.encode(creation),
    )
