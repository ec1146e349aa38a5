"""What all JSON bodies are made of. Unknown keys are ignored; where two spellings mean the same, both are
taken (`AliasChoices`)."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, StrictInt, StringConstraints

Id = Annotated[str, StringConstraints(min_length=1, max_length=192)]
SeqId = Annotated[StrictInt, Field(ge=0, lt=1 << 62)]
Int64 = Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 63)]  # larger numbers cannot be sent on
Finite = Annotated[float, Field(allow_inf_nan=False)]


def as_json(value: Any) -> Any:
    """The value, if answers can show it: JSON in UTF-8, without NaN and lone surrogates."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise ValueError("not JSON in UTF-8: NaN, infinity, half a character, or nested too deeply") from None
    return value


MOST_METADATA_BYTES = 64 << 10
"""Of one object's metadata, as JSON."""


def short_json(value: Any) -> Any:
    """As `as_json`, of at most `MOST_METADATA_BYTES`."""
    size = len(json.dumps(as_json(value), ensure_ascii=False).encode())
    if size > MOST_METADATA_BYTES:
        raise ValueError(f"{size} bytes as JSON; at most {MOST_METADATA_BYTES} are kept")
    return value


Json = Annotated[dict[str, Any], AfterValidator(as_json)]
Metadata = Annotated[dict[str, Any], AfterValidator(short_json)]
TextMetadata = Annotated[dict[str, str], AfterValidator(short_json)]
Tags = Annotated[list[Annotated[str, StringConstraints(max_length=256)]], Field(max_length=256)]
Label = Annotated[str, StringConstraints(max_length=1024)]
"""A name that people read, or an id of the client's own."""

DEFAULT_MODEL = "default"
"""What xorl's clients call their model where they do not say."""


def numbered(content: dict[str, Any]) -> tuple[Any, Any]:
    """Return the model_id and seq_id of an operation's body, whatever else is in it."""
    return content.get("model_id", content.get("session_id", DEFAULT_MODEL)), content.get("seq_id")


ModelId = Annotated[Id, Field(validation_alias=AliasChoices("model_id", "session_id"))]


class Body(BaseModel):
    # Only text that UTF-8 can write has a length: with a limit, halves of surrogate pairs are no strings.
    model_config = ConfigDict(
        extra="ignore", populate_by_name=True, protected_namespaces=(), str_max_length=1 << 28
    )


class OfModel(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"model_id": "model-abc-123"}]})
    model_id: ModelId = DEFAULT_MODEL


class Sequenced(Body):
    """An operation of a model. Without a seq_id it comes after all that have arrived."""

    model_id: ModelId = DEFAULT_MODEL
    seq_id: Annotated[StrictInt, Field(ge=1, lt=1 << 31)] | None = None


_UNION_TAGS = frozenset({"str", "int", "float", "bool"})
_MESSAGES = {
    "extra_forbidden": "not supported here, or not with this value",
    "model_type": "Input should be an object",
    "model_attributes_type": "Input should be an object",
}


def describe(errors: list[dict[str, Any]]) -> str:
    """Pydantic's errors in one line: `lora_config.rank: Input should be ...; ...`."""
    parts = []
    for error in errors[:5]:
        where = ".".join(str(part) for part in error["loc"] if part != "body" and not is_union_tag(part))
        message = _MESSAGES.get(error["type"]) or error["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(parts) or "invalid request"


def is_union_tag(part: str | int) -> bool:
    """Whether a part of a location is not a field, but which of several types was tried."""
    return isinstance(part, str) and (part in _UNION_TAGS or not part.isidentifier() or part[:1].isupper())
