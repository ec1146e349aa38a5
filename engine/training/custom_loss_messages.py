"""Messages between the engine and the processes that compute custom losses."""

from __future__ import annotations

import msgspec

from .. import messages

READY = b"ready"


class Task(msgspec.Struct, frozen=True):
    """One datum: the loss, and its inputs by name, `logprobs` among them."""

    loss: messages.CustomLoss
    values: dict[str, messages.Tensor]


class Result(msgspec.Struct, frozen=True, tag=True):
    """The loss, its float32 gradient by the log-probs, and the metrics by their wire names."""

    loss: float
    shape: tuple[int, ...]
    gradient: bytes
    metrics: dict[str, float]


class Failure(msgspec.Struct, frozen=True, tag=True):
    """The reason why there is no result: the user's fault, or an internal error."""

    message: str
    by_user: bool


def encode(message: Task | Result | Failure) -> bytes:
    return msgspec.msgpack.encode(message)


_TASKS = msgspec.msgpack.Decoder(Task)
_ANSWERS: msgspec.msgpack.Decoder[Result | Failure] = msgspec.msgpack.Decoder(Result | Failure)


def decode_task(data: bytes) -> Task:
    return _TASKS.decode(data)


def decode_answer(data: bytes) -> Result | Failure:
    return _ANSWERS.decode(data)
