"""The server without its routers and an engine."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, text
from tinsmith.engine import messages
from tinsmith.server.checkpoints.checkpoints import Checkpoints
from tinsmith.server.checkpoints.sweep import Sweep
from tinsmith.server.disk import Disk
from tinsmith.server.ledger import tenancy
from tinsmith.server.ledger.ledger import Ledger
from tinsmith.server.models.runs import Runs
from tinsmith.server.operations.operation import Submission
from tinsmith.server.operations.operations import Operations
from tinsmith.server.operations.payloads import Payloads
from tinsmith.server.settings import Settings
from tinsmith.server.supervision.supervisor import Supervisor

DAY = 24 * 3600.0
MODEL = "s:train:0"


class Server:
    """All but the routers and an engine, on one data directory; made again, it is a new start."""

    def __init__(self, data_dir: Path, **settings):
        self.settings = Settings(data_dir=data_dir, **settings)
        self.ledger = Ledger(self.settings.ledger_url)
        self.payloads = Payloads(self.ledger, self.settings.payload_dir)
        self.engine = Supervisor(
            self.settings.engine_config([]), lambda answer: None, load=self.payloads.load
        )
        self.operations = Operations(self.ledger, self.engine, Disk(data_dir, 0), self.payloads)
        self.runs = Runs(self.ledger, self.engine, self.operations, self.payloads, self.settings)
        self.sweep = Sweep(self.ledger, self.engine, self.runs.snapshots, self.payloads, self.settings)
        self.checkpoints = Checkpoints(self.ledger, self.sweep)

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
