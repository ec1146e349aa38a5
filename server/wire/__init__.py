"""The base of the models of JSON bodies, and the reading of JSON into them.

Unknown keys are ignored. Where two spellings mean the same, both are taken (`AliasChoices`).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import orjson
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    GetPydanticSchema,
    StrictInt,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import core_schema

from ..errors import BadRequest

Id = Annotated[str, StringConstraints(min_length=1, max_length=192)]
SeqId = Annotated[StrictInt, Field(ge=0, lt=1 << 62)]
Int64 = Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 63)]  # larger numbers cannot be sent on
Finite = Annotated[float, Field(allow_inf_nan=False)]


def as_json(value: Any) -> Any:
    """Return the value if answers can show it: JSON in UTF-8, without NaN, lone surrogates and huge
    integers."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        orjson.dumps(value)
    except (ValueError, TypeError, RecursionError):
        what = "NaN, infinity, half a character, an integer beyond 64 bits, or nested too deeply"
        raise ValueError(f"not JSON in UTF-8: {what}") from None
    return value


MOST_METADATA_BYTES = 64 << 10
"""The limit for one object's metadata, as JSON."""


def short_json(value: Any) -> Any:
    """Return the value if it is JSON of at most `MOST_METADATA_BYTES`."""
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
"""The model of xorl's clients that name none."""


def numbered(content: dict[str, Any]) -> tuple[Any, Any]:
    """Return the model_id and seq_id of an operation's body, which need not be valid otherwise."""
    return content.get("model_id", content.get("session_id", DEFAULT_MODEL)), content.get("seq_id")


ModelId = Annotated[Id, Field(validation_alias=AliasChoices("model_id", "session_id"))]


class Body(BaseModel):
    # Only text that UTF-8 can write has a length: with a limit, halves of surrogate pairs are no strings.
    model_config = ConfigDict(
        extra="ignore", populate_by_name=True, protected_namespaces=(), str_max_length=1 << 28
    )


def example(**fields: Any) -> dict[str, Any]:
    """Return the `json_schema_extra` of a body that shows an example of it in the OpenAPI document."""
    return {"examples": [fields]}


class OfModel(Body, json_schema_extra=example(model_id="model-abc-123")):
    model_id: ModelId = DEFAULT_MODEL


class Sequenced(Body):
    """An operation of a model. Without a seq_id it comes after all operations that have arrived."""

    model_id: ModelId = DEFAULT_MODEL
    seq_id: Annotated[StrictInt, Field(ge=1, lt=1 << 31)] | None = None


_UNION_TAGS = frozenset({"str", "int", "float", "bool"})
_MESSAGES = {
    "extra_forbidden": "not supported here, or not with this value",
    "model_type": "Input should be an object",
    "model_attributes_type": "Input should be an object",
}


def describe(errors: list[dict[str, Any]]) -> str:
    """Write pydantic's errors in one line: `lora_config.rank: Input should be ...; ...`."""
    parts = []
    for error in errors[:5]:
        if error["type"] == "json_invalid":
            at, why = error["loc"][-1], error.get("ctx", {}).get("error", "")
            return f"the body is not JSON: {why or error['msg']} at character {at}"
        if error["type"] == "missing" and tuple(error["loc"]) == ("body",):
            return "the body is missing; send a JSON object"
        where = ".".join(str(part) for part in error["loc"] if part != "body" and not is_union_tag(part))
        message = _MESSAGES.get(error["type"]) or error["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(parts) or "invalid request"


def is_union_tag(part: str | int) -> bool:
    """Return whether a part of an error's location names a union's type that was tried, and not a field."""
    return isinstance(part, str) and (part in _UNION_TAGS or not part.isidentifier() or part[:1].isupper())


AsksForNothing = Callable[[Any], bool]
Unsupported = dict[str, AsksForNothing]


def unsupported(asks_for_nothing: AsksForNothing, names: str) -> Unsupported:
    """Return the same rule for several fields, whose names are separated by spaces."""
    return dict.fromkeys(names.split(), asks_for_nothing)


def only(*values: Any) -> AsksForNothing:
    """Accept these values; True and 1 are different ones."""
    return lambda value: any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in values
    )


def anything(_value: Any) -> bool:
    """Accept every value: it changes no answer."""
    return True


def empty(value: Any) -> bool:
    """Accept an empty text, list or object."""
    return value in ("", [], {})


def one_or_list(value: Any) -> str:
    """Return the tag of a union's type, so that errors are about the type that was sent. No field has these
    names."""
    return LIST if isinstance(value, (list, tuple)) else ONE


ONE, LIST = "<one>", "<list>"


def no_biases(value: Any) -> bool:
    """Accept an object of numbers that are all zero."""
    return empty(value) or (isinstance(value, dict) and not any(value.values()))


def empty_or(*values: Any) -> AsksForNothing:
    """Accept what is empty, and these values."""
    return lambda value: empty(value) or only(*values)(value)


class Penalties(Body):
    """Fields that change a distribution before a token is drawn, as SGLang and vLLM have them."""

    min_p: Finite = Field(0.0, ge=0, le=1)
    repetition_penalty: Finite = Field(1.0, ge=0.01, le=100)
    presence_penalty: Finite = Field(0.0, ge=-2, le=2)
    frequency_penalty: Finite = Field(0.0, ge=-2, le=2)

    def penalties(self) -> dict[str, float]:
        """Return these fields as the engine's `SamplingParams` has them."""
        return {name: getattr(self, name) for name in Penalties.model_fields}


class StrictBody(Body):
    """A body in which null means the same as a field left out, and whose unknown fields are refused.

    `UNSUPPORTED` has the fields that are known and not supported, with the values that ask for nothing.
    """

    model_config = ConfigDict(extra="forbid")
    UNSUPPORTED: ClassVar[Unsupported] = {}
    NULLABLE: ClassVar[frozenset[str]] = frozenset()
    """Fields in which null has a meaning of its own."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if not cls._asks_for_nothing(name, value)}

    @classmethod
    def _asks_for_nothing(cls, name: str, value: Any) -> bool:
        known = cls.UNSUPPORTED.get(name)
        if value is None:
            return name not in cls.NULLABLE
        return known is not None and known(value)


def _packed(values: list[int]) -> np.ndarray:
    try:
        return np.asarray(values, np.int64)
    except OverflowError:
        at = next(at for at, value in enumerate(values) if not -(1 << 63) <= value < 1 << 63)
        raise ValueError(f"{str(values[at])[:32]} at position {at} does not fit in 64 bits") from None


def _schema(_type: Any, handler: Any) -> core_schema.CoreSchema:
    return core_schema.no_info_after_validator_function(_packed, handler.generate_schema(list[StrictInt]))


Integers = Annotated[np.ndarray, GetPydanticSchema(_schema)]
"""A list of integers in JSON, an int64 array in Python."""


class InvalidBody(Exception):
    """A body that is not JSON, or not what the route takes. `errors` are pydantic's."""

    def __init__(self, errors: list[dict[str, Any]]):
        super().__init__(errors)
        self.errors = errors


def parse(raw: bytes, model: type[BaseModel], longest: int) -> BaseModel:
    """Read a body as FastAPI would. Raises InvalidBody, and BadRequest for a prompt over `longest` tokens."""
    content = read_json(raw)
    try:
        body = model.model_validate(content)
    except ValidationError as error:
        errors = [
            {"type": each["type"], "loc": ("body", *each["loc"]), "msg": each["msg"]}
            for each in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise InvalidBody(errors[:100]) from None

    for prompt in getattr(body, "prompts", None) or []:
        if not isinstance(prompt, str) and len(prompt) > longest:
            raise BadRequest(f"prompt: {len(prompt)} tokens are over the limit of {longest}")
    return body


def read_json(raw: bytes) -> Any:
    """Return the value that JSON text stands for. Raises InvalidBody, or BadRequest."""
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        place = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON decode error"}
        raise InvalidBody([place | {"ctx": {"error": error.msg}}]) from None
    except (ValueError, RecursionError):
        long = find_long_number(raw, over_python_limit)
        if long is None:
            raise BadRequest("There was an error parsing the body") from None
        place = {"type": "int_parsing_size", "loc": ("body", *long.location), "msg": long.message}
        raise InvalidBody([place]) from None


Location = tuple[str | int, ...]


@dataclass(frozen=True)
class LongNumber:
    """A number in a body that is too long for the parser. `location`: the keys and indices that lead to it,
    the outermost first. `content`: the whole body, with a text in the number's place."""

    location: Location
    digits: int
    content: Any

    @property
    def message(self) -> str:
        return f"a number of {self.digits} digits is too long to be read"


def over_python_limit(digits: str) -> bool:
    """Return whether `json.loads` raises ValueError for this integer, as for all of more than 4300 digits."""
    digits = digits.lstrip("-")
    return digits.isdigit() and 0 < sys.get_int_max_str_digits() < len(digits)


def over_float64(digits: str) -> bool:
    """Return whether `orjson.loads` takes this number for infinity, which it refuses."""
    return math.isinf(float(digits))


def find_long_number(raw: bytes, is_too_long: Callable[[str], bool]) -> LongNumber | None:
    """Return the first number of a body for which `is_too_long`; None also for a body that is not JSON."""

    def number(digits: str) -> Any:
        if is_too_long(digits):
            return _TooLong(digits)
        return int(digits) if digits.lstrip("-").isdigit() else float(digits)

    try:
        content = json.loads(raw, parse_int=number, parse_float=number)
    except (ValueError, RecursionError):
        return None
    for location, value in _scalars(content):
        if isinstance(value, _TooLong):
            return LongNumber(location, sum(map(str.isdigit, value)), content)
    return None


class _TooLong(str):
    """The digits of a long number, in its place."""


def _scalars(content: Any) -> Iterator[tuple[Location, Any]]:
    """Yield the values that are neither objects nor lists, in the order in which they appear."""
    waiting: list[tuple[Location, Any]] = [((), content)]
    while waiting:
        location, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [((*location, key), inner) for key, inner in reversed(value.items())]
        elif isinstance(value, list):
            waiting += [((*location, index), inner) for index, inner in reversed([*enumerate(value)])]
        else:
            yield location, value
