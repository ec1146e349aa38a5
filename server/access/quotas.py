"""What each tenant may have and ask for: the settings, and what `tinsmith keys quota` says of some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..ledger import tenancy
from ..ledger.ledger import Ledger
from ..settings import Settings


@dataclass(frozen=True)
class Quota:
    """`models`: alive, which is in the engine or on the way into it. `checkpoint_bytes`: of complete ones.
    `queued_operations`: of training, accepted and not answered; `waiting_samples`: the same of samples.
    `queued_bytes`: of the bodies of either. `metadata_bytes`: of what sessions, models and samplers are
    called and described with."""

    models: int
    checkpoint_bytes: int
    queued_operations: int
    waiting_samples: int
    requests_per_second: float
    metadata_bytes: int
    queued_bytes: int


class Quotas:
    def __init__(self, settings: Settings):
        self._usual = Quota(
            settings.max_models,
            settings.max_checkpoint_bytes,
            settings.max_queued_operations,
            settings.max_waiting_samples,
            settings.max_requests_per_second,
            settings.max_metadata_bytes,
            settings.max_queued_bytes,
        )
        self._own: dict[str, Quota] = {}

    def of(self, tenant: str) -> Quota:
        return self._own.get(tenant, self._usual)

    def set_own(self, own: Mapping[str, Mapping[str, Any]]) -> None:
        """What differs from the usual, by tenant."""
        self._own = {tenant: replace(self._usual, **fields) for tenant, fields in own.items()}

    async def read(self, ledger: Ledger) -> None:
        """Takes up what the ledger says now."""
        self.set_own(await ledger.read(tenancy.quotas))
