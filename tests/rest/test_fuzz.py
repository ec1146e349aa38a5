"""Requests that schemathesis makes of the OpenAPI document, right and wrong: none is the server's fault.

`make fuzzrest` makes 20,000 of them, or `REST_CASES=...`; some are in `make slow`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from conformance.server_process import ServerProcess
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rest.clients import BOB, Xorl
from schemathesis.generation import GenerationMode
from tinsmith.server.app import create_app
from tinsmith.server.http.openapi import OPEN_PATHS
from tinsmith.server.settings import Settings

CASES = int(os.environ.get("TINSMITH_REST_CASES", "1000"))
_EXCLUDED = {"/sleep", "/wake_up"}  # all others would wait
SCHEMA = schemathesis.openapi.from_dict(create_app(Settings(data_dir=Path("none")), []).openapi())
OPERATIONS = [each.ok() for each in SCHEMA.get_all_operations() if each.ok().path not in _EXCLUDED]
PER_OPERATION = max(2, CASES // len(OPERATIONS))


@pytest.fixture(scope="module")
def tenant(rest_server: ServerProcess) -> ServerProcess:
    """The server, where the tenant has a model of the name that requests mean which give none."""
    with Xorl(rest_server.url, BOB) as client:
        client.done("create_model", base_model="tiny", lora_config={"rank": 4})
    return rest_server


@pytest.fixture(scope="module")
def statuses() -> Iterator[Counter[int]]:
    """A count of each status that the tenant got, shown with `-s`."""
    counted: Counter[int] = Counter()
    yield counted
    print(f"\n{counted.total()} cases:", dict(sorted(counted.items())))


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_no_request_is_the_servers_fault(
    operation: Any, tenant: ServerProcess, statuses: Counter[int]
) -> None:
    """There is no 5xx, errors have the common body, and without a valid key every answer is 401."""
    kinds = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    cases = st.one_of(*(operation.as_strategy(generation_mode=kind) for kind in kinds))

    @settings(
        max_examples=PER_OPERATION,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def ask(case: Any) -> None:
        with httpx.Client(base_url=tenant.url, timeout=120) as client:
            statuses[_ask(client, case)] += 1

    ask()


def _ask(client: httpx.Client, case: Any) -> int:
    """The status that the tenant has seen; 0 of a case that no client can send."""
    said = dict(case.headers or {})
    said = {name: each for name, each in said.items() if name.lower() not in ("x-api-key", "authorization")}
    arguments = case.as_transport_kwargs()
    path = case.formatted_path
    fields = {"params": arguments.get("params"), "json": arguments.get("json")}
    data = arguments.get("data")
    if isinstance(data, bytes | str):
        fields["content"] = data
    fields = {name: value for name, value in fields.items() if value is not None}
    kind = {"Content-Type": case.media_type} if case.media_type and "content" in fields else {}
    answers = []
    for key in (BOB, "tml-wrong", None):
        own = {} if key is None else {"X-API-Key": key}
        try:
            answers.append(client.request(case.method, path, headers=said | kind | own, **fields))
        except (UnicodeEncodeError, httpx.InvalidURL, httpx.LocalProtocolError, ValueError):
            return 0
        if case.operation.path in OPEN_PATHS:
            break
    answer, *refused = answers
    assert [each.status_code for each in refused] == [401] * len(refused)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and answer.status_code != 408:
        assert {"detail", "error", "category"} <= answer.json().keys()
    return answer.status_code
