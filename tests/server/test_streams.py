"""Streams of samples that fail: the error is an event in the shape that the route's clients know."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from tinsmith.engine import messages
from tinsmith.server.http.routes.generate import Answers, Prompt
from tinsmith.server.http.routes.openai import ChatAnswers
from tinsmith.server.http.sample_targets import ServedModel
from tinsmith.server.http.samples import Running, SampleRequest, ServedSamples
from tinsmith.server.operations.operation import Operation
from tinsmith.server.operations.sample_streams import SampleStreams
from tinsmith.server.text import ChatTokenizer
from tinsmith.server.wire.sample_requests import Generate
from tiny_models import write_model

MODEL = ServedModel("tiny", messages.SamplerRef("tiny"))
FAILURES = {
    "user": (messages.Failed("req_1", "prompt: not this one", "user"), "prompt: not this one"),
    "server": (messages.Failed("req_1", "the device is gone", "server"), "the device is gone"),
    "bug": (messages.Done("req_1", messages.SampleOutput([None])), "internal error"),  # type: ignore[list-item]
}


def failed(answer: Any) -> tuple[ServedSamples, list[Running]]:
    """Samples of which only the streams are there, and a sample that was answered so after one token."""
    streams = SampleStreams()
    streams.open("req_1", "me")
    streams.add(messages.Drawn("req_1", 0, 0, b"\x05\0\0\0", b"\0\0\0\0", None))
    operation = Operation("req_1", "me", "sample", "", 0, {}, None, answer=answer)
    asked = SampleRequest(MODEL, [5], messages.SamplingParams(max_tokens=4), stream=True)
    running = Running(asked, operation, streams.of("req_1"))
    operation.finished.set()
    submits = SimpleNamespace(cancel=lambda operation: streams.close(operation.request_id))
    return ServedSamples(submits, streams, None, None, 1, 15.0), [running]  # type: ignore[arg-type]


async def events(stream: AsyncIterator[bytes]) -> list[Any]:
    lines = [line.decode().removeprefix("data: ").strip() async for line in stream]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer(write_model(tmp_path_factory.mktemp("model") / "tiny", "llama"))


@pytest.mark.parametrize("how", FAILURES)
async def test_a_stream_of_openais_ends_with_an_error_of_openais(text: ChatTokenizer, how: str) -> None:
    answer, message = FAILURES[how]
    served, running = failed(answer)
    answers = ChatAnswers("tiny", text, False, True, 1)
    error = (await events(answers.events(served, running)))[-1]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert error["type"] == ("invalid_request_error" if how == "user" else "server_error")
    assert error["param"] == ("prompt" if how == "user" else None)


@pytest.mark.parametrize("how", FAILURES)
async def test_a_stream_of_generate_ends_with_an_error_of_sglangs(text: ChatTokenizer, how: str) -> None:
    answer, message = FAILURES[how]
    served, running = failed(answer)
    body = Generate.model_validate({"input_ids": [5], "stream": True})
    answers = Answers(served, body, [Prompt(body.each[0], MODEL, 320, text)], running, 0.0)
    error = (await events(answers.events("me")))[-1]["error"]
    assert message in error["message"]
    assert error["code"] == (400 if how == "user" else 500)
