"""The OpenAPI document: its examples are tested, and any body that its schemas allow has an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from conformance.server_process import ServerProcess
from rest.clients import ALICE, Tinkercloud
from rest.documented import Document
from tinsmith.server.http.openapi import OPEN_PATHS


@pytest.fixture(scope="module")
def document(rest_server: ServerProcess) -> dict[str, Any]:
    with Tinkercloud(rest_server.url, ALICE) as client:
        return client.get("/openapi.json").json()


def examples(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the examples of JSON bodies, each with its path."""
    for path, operations in document["paths"].items():
        content = operations.get("post", {}).get("requestBody", {}).get("content", {})
        reference = content.get("application/json", {}).get("schema", {}).get("$ref")
        if reference is not None:
            schema = document["components"]["schemas"][reference.rpartition("/")[2]]
            yield from ((path, example) for example in schema.get("examples", []))


def test_examples_are_what_the_routes_take(tinkercloud: Tinkercloud, document: dict[str, Any]) -> None:
    """The things that they name are missing, and the answer says so; none is refused as an unreadable
    body."""
    seen = set()
    for path, example in examples(document):
        answer = tinkercloud.post(path, json=example)
        assert answer.status_code in (200, 400, 404), (path, answer.text)
        assert answer.status_code != 200 or isinstance(answer.json(), dict)
        seen.add(path)
    pages = ("create_model", "forward_backward", "forward", "optim_step", "asample", "save_weights")
    pages += ("save_weights_for_sampler", "weights_info", "create_session", "session_heartbeat")
    pages += ("create_sampling_session", "create_sampling_client", "get_info", "delete_model")
    pages += ("cleanup_futures", "retrieve_future")
    assert {f"/api/v1/{page}" for page in pages} <= seen


def test_both_kinds_of_keys_are_described(document: dict[str, Any]) -> None:
    kinds = document["components"]["securitySchemes"]
    assert {each["type"] for each in kinds.values()} == {"apiKey", "http"}
    assert document["security"]
    for path in OPEN_PATHS:
        assert document["paths"][path]["get"]["security"] == []


def test_forward_backward_is_json_or_protobuf(document: dict[str, Any]) -> None:
    for name in ("forward", "forward_backward"):
        content = document["paths"][f"/api/v1/{name}"]["post"]["requestBody"]["content"]
        assert set(content) == {"application/json", "application/x-protobuf"}


def test_every_answer_is_described(document: dict[str, Any]) -> None:
    """JSON by a schema with keys; files and streams by their media types."""
    described = Document(document)
    files, streams, others = set(), set(), set()
    for (method, path), operation in described.operations():
        good = {status: answer for status, answer in operation["responses"].items() if status.startswith("2")}
        if not good:
            others.add(path)
        for status, answer in good.items():
            assert answer["content"], f"{method} {path}: {status} has no content"
            for kind, content in answer["content"].items():
                if kind == "application/json":
                    for schema in described.resolved(content["schema"]):
                        schema = schema.get("items", schema)
                        (found,) = described.resolved(schema)
                        assert found["properties"], f"{method} {path}: {found}"
                    continue
                assert content["schema"]["type"] == "string"
                files |= {path.rpartition("/")[2]} if content["schema"].get("format") == "binary" else set()
                streams |= {path} if kind == "text/event-stream" else set()
    assert files == {"archive.tar", "{file}", "retrieve_future"}
    assert streams == {"/generate", "/v1/completions", "/v1/chat/completions"}
    redirects = {path for path in others if path.endswith("/archive")}
    assert len(redirects) == 1
    assert all("410" in document["paths"][path]["post"]["responses"] for path in others - redirects)


def test_every_name_is_one_schema_s(document: dict[str, Any]) -> None:
    """Each schema is used, each reference leads to one, and no two types share a name: those would be written
    as `Name-Input` and `Name-Output`, or with their modules."""
    names = document["components"]["schemas"].keys()
    assert set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document))) == names
    assert not [name for name in names if "-" in name or "__" in name]
