"""Makes `api.md` of the server's OpenAPI document: `python docs/generate.py`.

Routes are grouped by tag. A schema of only one route is shown with it, the others in a section of types.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinsmith.server.app import create_app
from tinsmith.server.settings import Settings

_INTRODUCTION = """# API

Every route of the server, as its OpenAPI document describes it. A running server has the same at `/docs`,
where requests can be tried, and as JSON at `/openapi.json`.

- **Keys.** Every route needs one, as `X-API-Key: tml-...` or `Authorization: Bearer tml-...`, unless it says
  "No key". A server that was started without keys accepts any.
- **Two kinds of answers.** Short requests are answered at once. Training, sampling and saving are answered
  with a `request_id`, whose result is polled with [`retrieve_future`](#post-apiv1retrieve_future): 408 means
  that there is none yet, and 200 brings it.
- **Clients.** The SDK, tinkercloud's and xorl's clients share these routes. The header `X-API-Dialect` says
  whose a request is where they differ ([compatibility.md](compatibility.md)).
- **Bodies** are JSON. Those of `forward` and `forward_backward` may be protobuf, and compressed with zstd.
  Training requests may have 256 MiB (`--max-body-bytes`), sampling requests 16 MiB, imported adapters 4 GiB
  (`--max-import-bytes`), and all others 1 MiB. Unknown fields are ignored unless the route says otherwise.
- **Errors** have an [`Error`](#error) as their body; under `/v1` its `error` is in OpenAI's shape.

| status | meaning |
|---|---|
"""

_TITLES = {
    "service": ("Service", "The state of the server, and what it can do."),
    "sessions": ("Sessions", "What a client opens first. Models and samplers belong to a session."),
    "models": ("Models", "Create, describe and unload the models that clients train."),
    "training": (
        "Training",
        "Gradients and optimizer steps. Operations of a model run in the order of `seq_id`.",
    ),
    "futures": ("Results", "Polls for the results of accepted requests."),
    "sampling": ("Sampling", "Samples and log-probs, from samplers and base models."),
    "inference": ("Sampling with OpenAI's and SGLang's routes", "See [serving.md](serving.md)."),
    "weights": ("Saving and loading weights", "Checkpoints of models, and adapters from elsewhere."),
    "training runs": ("Training runs", "Models as the SDK's `RestClient` and the console list them."),
    "checkpoints": ("Checkpoints", "List, publish, copy and delete checkpoints."),
    "downloads": ("Downloads", "The files of checkpoints. Signed URLs open these routes without a key."),
    "console": ("Console", "What the [console](console.md) shows."),
    "traces": ("Traces", "The timeline of a session."),
    "accounts": ("Accounts", "Usage and the audit log ([accounts.md](accounts.md))."),
    "credentials": ("Credentials", "Tokens, and the key of the caller ([accounts.md](accounts.md))."),
    "inference servers": ("SGLang servers", "See [sglang.md](sglang.md)."),
    "engine": ("Engine", "Sleep and wake ([serving.md](serving.md#sleep))."),
}
"""The title and the first sentence of each tag's section, in the order of the page."""

_SIZES = (("Length", "characters"), ("Items", "items"), ("Properties", "keys"))
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_TOO_LARGE = 1 << 28  # limits beyond it only protect the server


def api_page() -> str:
    """Return the page's Markdown."""
    settings = Settings(model=["base"], data_dir=Path("/nonexistent"))
    return Page(create_app(settings, base_models=[]).openapi()).text()


class Page:
    """The Markdown of one OpenAPI document."""

    def __init__(self, document: dict[str, Any]):
        self._paths: dict[str, dict[str, Any]] = document["paths"]
        self._schemas: dict[str, dict[str, Any]] = document["components"]["schemas"]
        self._sent = self._within([each.get("requestBody") for *_, each in self._operations()])
        """The names of schemas of bodies; the others are of answers."""
        uses = Counter(name for *_, each in self._operations() for name in set(_names(each)))
        nested = {name for schema in self._schemas.values() for name in _names(schema)}
        self._inline = {name for name, number in uses.items() if number == 1} - nested

    def text(self) -> str:
        return _INTRODUCTION + "\n".join(self._lines()).rstrip() + "\n"

    def _operations(self) -> Iterator[tuple[list[str], dict[str, Any]]]:
        """The operations, each with its methods and paths: several of those that are the same."""
        found: dict[str, tuple[list[str], dict[str, Any]]] = {}
        for path, methods in self._paths.items():
            for method, operation in methods.items():
                same = str(
                    {key: each for key, each in operation.items() if key not in ("operationId", "summary")}
                )
                found.setdefault(same, ([], operation))[0].append(f"{method.upper()} {path}")
        yield from found.values()

    def _within(self, schema: Any) -> set[str]:
        """The names of the schemas in a schema, and of those in them."""
        found: set[str] = set()
        new = set(_names(schema))
        while new:
            found |= new
            new = {name for each in new for name in _names(self._schemas[each])} - found
        return found

    def _lines(self) -> Iterator[str]:
        operations = [*self._operations()]
        yield from self._statuses(operations)
        unknown = {operation["tags"][0] for _, operation in operations} - _TITLES.keys()
        assert not unknown, f"docs/api.py has no title for the tags {unknown}"
        shown: set[str] = set()
        for tag, (title, sentence) in _TITLES.items():
            yield f"\n## {title}\n\n{sentence}\n"
            for routes, operation in operations:
                if operation["tags"][0] == tag:
                    yield from self._operation(routes, operation, shown)
        yield "\n## Types\n\nThe parts that several routes share.\n"
        for name in sorted(self._schemas.keys() - shown, key=str.lower):
            yield f"### {name}\n"
            yield from self._type(name)

    @staticmethod
    def _statuses(operations: list[tuple[list[str], dict[str, Any]]]) -> Iterator[str]:
        """The statuses of errors, each with the meaning that most routes give it."""
        meanings: dict[str, Counter[str]] = {}
        for _, operation in operations:
            for status, answer in operation["responses"].items():
                if status.startswith(("4", "5")):
                    meanings.setdefault(status, Counter())[answer["description"]] += 1
        for status, found in sorted(meanings.items()):
            yield f"| {status} | {found.most_common(1)[0][0]} |"

    def _operation(self, routes: list[str], operation: dict[str, Any], shown: set[str]) -> Iterator[str]:
        route, *others = sorted(routes, key=len)
        yield f"### {route}\n"
        assert "description" in operation, f"{route}: the function needs a docstring"
        sentences = [" ".join(operation["description"].split())]
        sentences += [f"Also {', '.join(f'`{each}`' for each in others)}."] if others else []
        sentences += ["No key."] if operation.get("security") == [] else []
        yield f"{' '.join(sentences)}\n"
        if parameters := [each for each in operation.get("parameters", []) if each["in"] != "header"]:
            yield "| parameter | type | meaning |\n|---|---|---|"
            for each in parameters:
                name = each["name"] if each["in"] == "query" else f"{{{each['name']}}}"
                yield _row(f"`{name}`", self._kind(each["schema"]), self._meaning(each["schema"], each))
            yield ""
        content = operation.get("requestBody", {}).get("content", {})
        for kind, body in content.items():
            title = "Body" if kind == "application/json" else f"Body, as `{kind}`"
            yield from self._part(title, body["schema"], shown)
        for status, answer in operation["responses"].items():
            if not status.startswith("2"):
                continue
            for kind, body in answer.get("content", {}).items():
                title = "Answer" if kind == "application/json" else f"Answer, as `{kind}`"
                yield from self._part(title, body["schema"], shown)

    def _part(self, title: str, schema: dict[str, Any], shown: set[str]) -> Iterator[str]:
        """A body or an answer: with its fields if it is used here alone, else by its name."""
        name = next(iter(_names(schema)), "") if "$ref" in schema else ""
        if name in self._inline:
            shown.add(name)
            yield f"{title}:\n"
            yield from self._type(name)
        else:
            meaning = schema.get("description", "")
            yield f"{title}: {self._kind(schema)}{f' ({meaning})' if meaning else ''}\n"

    def _type(self, name: str) -> Iterator[str]:
        schema = self._schemas[name]
        if text := " ".join((schema.get("description") or "").split()):
            yield f"{text}\n"
        properties = schema.get("properties", {})
        if not properties:
            yield f"{self._kind(schema)}\n"
            return
        rows = []
        for field, each in properties.items():
            required, is_sent = field in schema.get("required", []), name in self._sent
            notes = {"required": required and is_sent, "optional": not required and not is_sent}
            rows.append((f"`{field}`", self._kind(each), self._meaning(each, notes)))
        columns = 3 if any(meaning for *_, meaning in rows) else 2
        yield _row(*("field", "type", "meaning")[:columns]) + "\n|" + "---|" * columns
        yield from (_row(*row[:columns]) for row in rows)
        yield ""

    def _kind(self, schema: dict[str, Any]) -> str:
        """The type in words, with its limits."""
        limits = "; ".join(_limits(schema))
        return f"{self._bare_kind(schema)}{f' ({limits})' if limits else ''}"

    def _bare_kind(self, schema: dict[str, Any]) -> str:
        match schema:
            case {"$ref": reference}:
                name = reference.rpartition("/")[2]
                return f"[{name}](#{name.lower()})"
            case {"const": value}:
                return _code(value)
            case {"enum": values}:
                return " or ".join(map(_code, values))
            case {"anyOf": choices} | {"oneOf": choices}:
                return " or ".join(dict.fromkeys(self._kind(each) for each in choices))
            case {"allOf": [only]}:
                return self._kind(only)
            case {"type": "array", "prefixItems": items}:
                return f"[{', '.join(self._kind(each) for each in items)}]"
            case {"type": "array", "items": items} if items:
                kind = self._kind(items)
                return f"list of ({kind})" if " or " in kind else f"list of {kind}"
            case {"type": "object", "additionalProperties": dict(values)} if values:
                return f"object of {self._kind(values)}"
            case {"type": "string", "format": "binary"}:
                return "bytes"
            case {"type": list(kinds)}:
                return " or ".join(kinds)
            case {"type": kind}:
                return str(kind)
        return "any JSON"

    def _meaning(self, schema: dict[str, Any], about: dict[str, Any]) -> str:
        parts = [schema.get("description") or about.get("description") or ""]
        if about.get("required"):
            parts.insert(0, "required")
        elif about.get("optional"):
            parts.append("not always there")
        elif schema.get("default") not in (None, "", [], {}) and not isinstance(schema["default"], dict):
            parts.append(f"default {_code(schema['default'])}")
        return "; ".join(" ".join(part.split()) for part in parts if part)


def _names(schema: Any) -> list[str]:
    """The names of the schemas that a schema refers to."""
    return re.findall(r"'#/components/schemas/([^']+)'", str(schema))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _code(value: Any) -> str:
    text = (
        {True: "true", False: "false", None: "null"}.get(value, value)
        if value is None or isinstance(value, bool)
        else value
    )
    return f"`{text}`"


def _limits(schema: dict[str, Any]) -> Iterator[str]:
    for key, sign in _BOUNDS.items():
        if key in schema and abs(schema[key]) < _TOO_LARGE:
            bound = float(schema[key])
            yield f"{sign} {bound:,.0f}" if bound.is_integer() else f"{sign} {bound}"
    for key, unit in _SIZES:
        least, most = schema.get(f"min{key}", 0), schema.get(f"max{key}", _TOO_LARGE)
        if least or most < _TOO_LARGE:
            yield f"{least} to {most:,} {unit}" if most < _TOO_LARGE else f"at least {least} {unit}"
    if "pattern" in schema:
        yield f"matching `{schema['pattern']}`"
