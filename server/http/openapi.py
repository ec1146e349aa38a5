"""The OpenAPI document: FastAPI's own, completed by what FastAPI does not see in the routes.

FastAPI does not see bodies that a route reads by itself (those of forward_backward are JSON or protobuf),
keys, and the error body that all routes share.
"""

from __future__ import annotations

from types import ModuleType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema
from typing_extensions import is_typeddict

from ..wire import openai, responses, sample_requests
from ..wire.training import ForwardBackward

DESCRIPTION = """Trains language models and samples what it trains. Three kinds of clients are served on the
same routes: the Tinker SDK, and the REST APIs of tinkercloud and of xorl; requests may have the shape of any
of them, and answers have the fields of all. `X-API-Dialect` (`tinker`, `tinkercloud`, `xorl`) says whose a
request is where that matters. What takes long is answered with a `request_id`, and polled with
retrieve_future."""

_REF = "#/components/schemas/{model}"
BINARY = {"type": "string", "format": "binary"}
"""The schema of a body that is not text."""

_OPENAI_ERROR = {
    "type": "object",
    "title": "OpenAI error",
    "required": ["message", "type", "param", "code"],
    "properties": {
        "message": {"type": "string", "description": "what was wrong, where, and what would be right"},
        "type": {"type": "string"},
        "param": {"type": ["string", "null"], "description": "the field that is wrong"},
        "code": {"type": ["string", "null"]},
    },
}
_ERROR = {
    "type": "object",
    "title": "Error",
    "required": ["detail", "error", "category", "status_code", "path"],
    "properties": {
        "detail": {"type": "string", "description": "what was wrong, where, and what would be right"},
        "error": {
            "description": "the same, under /v1 in OpenAI's shape",
            "anyOf": [{"type": "string"}, _OPENAI_ERROR],
        },
        "category": {"enum": ["user", "server"]},
        "status_code": {"type": "integer"},
        "path": {"type": "string"},
    },
}
# Answered without a key: probes of load balancers have none.
OPEN_PATHS = frozenset({"/health", "/api/v1/health", "/api/v1/healthz", "/healthz"})
_POLLS = ("/api/v1/retrieve_future", "/api/v1/retrieve_future/{request_id}")
_STATUSES = {
    "400": "the request is wrong",
    "401": "no key, or none of this server's",
    "403": "the key does not open it, or a quota is reached",
    "404": "there is no such thing, or none of the caller's",
    "410": "it was there once",
    "413": "the body is too large",
    "415": "the body has a Content-Encoding that the route does not take",
    "422": "the body is not what the route takes",
    "429": "too many; again after Retry-After",
    "503": "not now; again after Retry-After",
    "507": "there is no room",
}
_PROTOBUF = {"type": "string", "format": "binary", "description": "a ForwardBackwardRequest"}


def install(app: FastAPI) -> None:
    """Make `app.openapi()` return this document, built once."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    made = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
    components = made.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    _, own = models_json_schema([(ForwardBackward, "validation")], ref_template=_REF)
    schemas |= own["$defs"] | {"Error": _ERROR}
    answers = _answers(responses, openai, sample_requests)
    if twice := schemas.keys() & answers.keys():
        raise ValueError(f"a body and an answer have the same name: {', '.join(twice)}")
    schemas |= answers
    components["securitySchemes"] = {
        "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        "bearer": {"type": "http", "scheme": "bearer"},
    }
    made["security"] = [{"key": []}, {"bearer": []}]
    for path, operations in made["paths"].items():
        for operation in operations.values():
            _complete(path, operation)
    for path in ("/api/v1/forward", "/api/v1/forward_backward"):
        made["paths"][path]["post"]["requestBody"] = {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": _REF.format(model="ForwardBackward")}},
                "application/x-protobuf": {"schema": _PROTOBUF},
            },
        }
    return made


def schema_of(answer: Any) -> dict[str, Any]:
    """Refer to the schema of an answer's type: one TypedDict, a list of them, or a union."""
    if get_origin(answer) in (Union, UnionType):
        return {"anyOf": [schema_of(each) for each in get_args(answer)]}
    if get_origin(answer) is list:
        return {"type": "array", "items": schema_of(*get_args(answer))}
    return {"$ref": _REF.format(model=answer.__name__)}


def _answers(*modules: ModuleType) -> dict[str, Any]:
    """Return the schemas of all types of answers that the modules define."""
    types = [
        each
        for module in modules
        for each in vars(module).values()
        if is_typeddict(each) and each.__module__ == module.__name__ and each.__name__[0] != "_"
    ]
    written: Literal["serialization"] = "serialization"
    adapters = [(each, written, TypeAdapter(each)) for each in types]
    return TypeAdapter.json_schemas(adapters, ref_template=_REF)[1]["$defs"]


def _complete(path: str, operation: dict[str, Any]) -> None:
    answers = operation["responses"]
    for answer in answers.values():
        for content in answer.get("content", {}).values():
            content["schema"] = _described(content["schema"])
    refused = _json({"$ref": _REF.format(model="Error")})
    if path in OPEN_PATHS:
        operation["security"] = []
    for status, meaning in _STATUSES.items():
        if path not in OPEN_PATHS:
            answers[status] = {"description": meaning, "content": refused}
    if path in _POLLS:
        answers["408"] = {
            "description": "no result yet: poll again",
            "content": _json(schema_of(responses.PendingFuture)),
        }
    if path in (*_POLLS, "/api/v1/sample"):
        either = [{"$ref": _REF.format(model="Error")}, schema_of(responses.FailedFuture)]
        answers["400"]["content"] = _json({"anyOf": either})


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the content of an answer in JSON."""
    return {"application/json": {"schema": schema}}


def _described(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the route's own schema of its answer, if it has one, without what FastAPI adds from the
    handler's annotation."""
    named: dict[str, Any] = {key: schema[key] for key in ("$ref", "anyOf") if key in schema}
    return named or schema
