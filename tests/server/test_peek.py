"""The number of an operation is found in JSON that comes in any pieces, wherever it stands."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinsmith.server.wire import training

NAMES = ["model_id", "session_id", "seq_id"]
texts = st.text(st.sampled_from('a{}[]",:\\é\n'), max_size=8) | st.sampled_from(NAMES)
scalars = st.integers(-9, 9) | texts | st.none() | st.floats(allow_nan=False)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)
bodies = st.dictionaries(texts, values, max_size=5)


def found(raw: bytes, sizes: list[int], is_complete: bool = True) -> tuple[Any, Any]:
    number = training.JsonNumber()
    for size in sizes:
        number.feed(raw[:size])
        raw = raw[size:]
    number.feed(raw)
    return number.found(is_complete)


@settings(max_examples=300, deadline=None)
@given(bodies, st.lists(st.integers(0, 900), max_size=8), st.sampled_from([0, 600, 3000]), st.booleans())
def test_it_is_what_a_parser_finds(
    body: dict[str, Any], sizes: list[int], padding: int, spaces: bool
) -> None:
    body = {"padding": "\\" * padding, **body, "more": [body, "}" * padding]}
    for name in NAMES:
        if name in body and not isinstance(body[name], (str, int)):
            del body[name]
    raw = json.dumps(body, indent=2 if spaces else None, ensure_ascii=False).encode()
    model = body.get("model_id", body.get("session_id", "default"))
    assert found(raw, sizes) == (model, body.get("seq_id"))


def test_a_number_before_the_cut_of_a_body_is_found() -> None:
    raw = json.dumps({"a": ["{"] * 500, "seq_id": 12, "model_id": "m", "b": "c" * 5000}).encode()
    assert found(raw[:-9], [7] * 900, is_complete=False) == ("m", 12)
    assert found(raw[: raw.index(b"12") + 1], [], is_complete=False) == (None, None), "it may be 1 or 12"


@pytest.mark.parametrize(
    "piece", [b'"', b'\\"', b'"\\', b"{", b'{"seq_id":', b'"seq_id":1,', b"]}", b"\xff\xfe"]
)
def test_any_bytes_are_read_without_an_error(piece: bytes) -> None:
    found(b"{" + piece * 20_000, [1000] * 50, is_complete=False)
