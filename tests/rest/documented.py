"""Compares a server's answers with the OpenAPI document."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
from tinsmith.server.app import create_app
from tinsmith.server.settings import Settings

Route = tuple[str, str]
"""A method and a path as the document writes it."""


class Documented:
    """An httpx hook for responses. It fails for an answer that is not as its route is documented, and for one
    with a key that the document does not have. `seen`: the routes whose successful answers were compared."""

    def __init__(self) -> None:
        self.seen: set[Route] = set()

    def __call__(self, response: httpx.Response) -> None:
        kind = response.headers.get("content-type", "").partition(";")[0]
        document = _document()
        route = document.route(response.request.method, response.request.url.path)
        if route is None or response.status_code >= 500:
            return
        answers = document.operation(route)["responses"]
        assert str(response.status_code) in answers, f"{route}: {response.status_code} is not documented"
        content = answers[str(response.status_code)].get("content", {})
        if not content:
            return
        assert kind in content, f"{route}: {kind} is none of {[*content]}"
        if kind == "application/json":
            response.read()
            document.check(route, response.status_code, response.json())
        if response.status_code < 300:
            self.seen.add(route)

    def check_events(self, route: Route, events: Iterator[str]) -> int:
        """Compare the lines of a stream of events; returns how many were compared."""
        document = _document()
        schema = document.operation(route)["responses"]["200"]["content"]["text/event-stream"]["schema"]
        checked = 0
        for line in events:
            if line.startswith("data: ") and line != "data: [DONE]":
                document.validator(schema["contentSchema"]).validate(json.loads(line.removeprefix("data: ")))
                checked += 1
        return checked


class Document:
    """An OpenAPI document. In `check`, keys that it does not have are errors."""

    def __init__(self, document: dict[str, Any]):
        self._document = document
        self._schemas = copy.deepcopy(document["components"]["schemas"])
        for schema in self._schemas.values():
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)
        # Paths without parameters first: they hide those with parameters.
        self._paths = [
            (re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path))), path)
            for path in sorted(document["paths"], key=lambda path: path.count("{"))
        ]

    def operations(self) -> Iterator[tuple[Route, dict[str, Any]]]:
        for path, operations in self._document["paths"].items():
            for method, operation in operations.items():
                yield (method.upper(), path), operation

    def operation(self, route: Route) -> dict[str, Any]:
        return self._document["paths"][route[1]][route[0].lower()]

    def route(self, method: str, path: str) -> Route | None:
        """Return the route of a request, or None if the document does not have it."""
        for pattern, template in self._paths:
            if pattern.fullmatch(path) and method.lower() in self._document["paths"][template]:
                return method, template
        return None

    def check(self, route: Route, status: int, answer: Any) -> None:
        schema = self.operation(route)["responses"][str(status)]["content"]["application/json"]["schema"]
        error = jsonschema.exceptions.best_match(self.validator(schema).iter_errors(answer))
        assert error is None, (
            f"{route}: {status}: {error.json_path}: {error.message}; of {str(answer)[:2000]}"
        )

    def validator(self, schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
        return jsonschema.Draft202012Validator({**schema, "components": {"schemas": self._schemas}})

    def resolved(self, schema: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the alternatives of a schema, with references resolved."""
        if "$ref" in schema:
            return self.resolved(self._schemas[schema["$ref"].rpartition("/")[2]])
        return (
            [each for one in schema["anyOf"] for each in self.resolved(one)]
            if "anyOf" in schema
            else [schema]
        )


@functools.cache
def _document() -> Document:
    return Document(create_app(Settings(data_dir=Path("none")), []).openapi())
