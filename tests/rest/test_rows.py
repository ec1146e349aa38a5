"""Every row of both pages, in the page's shape and in its clients'; `docs/compatibility.md` lists them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from conformance.server_process import ServerProcess
from rest import tinkercloud_rows, xorl_rows
from rest.clients import ALICE, Tinkercloud, Xorl
from rest.rows import Row, filled, like

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
PAGES: dict[str, tuple[Row, ...]] = {"tinkercloud": tinkercloud_rows.ROWS, "xorl": xorl_rows.ROWS}


@pytest.fixture(scope="module")
def things(rest_server: ServerProcess) -> dict[str, Any]:
    """Models of tinkercloud's, one of them unloaded and two to delete, and what the rows go on with."""
    with Tinkercloud(rest_server.url, ALICE) as client:
        session = client.ask("create_session")["session_id"]
        made = [
            client.done(
                "create_model",
                session_id=session,
                model_seq_id=number,
                base_model="tiny",
                lora_config={"rank": 4},
            )["model_id"]
            for number in range(4)
        ]
        request = client.ask("unload_model", model_id=made[1])["request_id"]
    models = {"model": made[0], "second": made[2], "third": made[3]}
    return models | {"session": session, "request": request, "port": rest_server.port}


def ask(client: Tinkercloud | Xorl, row: Row, things: dict[str, Any]) -> None:
    body = filled(row.body, things)
    answer = client.request(row.method, filled(row.path, things), json=body)
    assert answer.status_code == row.status, answer.text
    like(row.answer, answer.json())
    if row.result is None:
        return
    polled = client.poll(answer.json()["request_id"])
    if isinstance(polled, dict):
        assert "error" not in polled, polled
        like(row.result, polled)
    else:
        assert polled.status_code == 200, polled.text
        like(row.result, polled.json())
        like(row.result, polled.json()["result"])


@pytest.mark.parametrize("row", PAGES["tinkercloud"], ids=lambda row: row.name)
def test_tinkercloud(tinkercloud: Tinkercloud, things: dict[str, Any], row: Row) -> None:
    ask(tinkercloud, row, things)


@pytest.mark.parametrize("row", PAGES["xorl"], ids=lambda row: row.name)
def test_xorl(xorl: Xorl, things: dict[str, Any], row: Row) -> None:
    ask(xorl, row, things)


def table(page: str) -> str:
    """One line for an endpoint: the rows of each shape are tests, which pass."""
    paths: dict[tuple[str, str], dict[str, int]] = {}
    for row in PAGES[page]:
        path = re.sub(r"\$(\w+)\$(:sample:\d)?", r"{\1}", row.path.partition("?")[0])
        counted = paths.setdefault((row.method, path), {"page": 0, "client": 0})
        counted[row.shape] += 1
    lines = ["| endpoint | page | clients |", "|---|---|---|"]
    for (method, path), counted in paths.items():
        passes = ["passes" if counted[shape] else "not on it" for shape in ("page", "client")]
        lines.append(f"| `{method} {path}` | {' | '.join(passes)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES)
def test_the_document_lists_these(page: str) -> None:
    """`TINSMITH_WRITE_TABLES=1` writes them."""
    begin, end = f"<!-- rows of {page} -->\n", f"\n<!-- end of {page} -->"
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(begin)
    _old, _, after = rest.partition(end)
    if os.environ.get("TINSMITH_WRITE_TABLES"):
        DOCUMENT.write_text(before + begin + table(page) + end + after)
    assert table(page) in DOCUMENT.read_text()
