"""`create_custom_loss` bodies. What the graph calls is the engine's to judge."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, StrictInt, StringConstraints

from ...engine import messages
from ..errors import BadRequest
from .body import Body, Id, Json, SeqId

MAX_GRAPH_BYTES = 128 << 10


class CustomLossInput(Body):
    name: Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_]{0,63}$")]
    rank: Annotated[StrictInt, Field(ge=0, le=2)]


class CreateCustomLoss(Body):
    session_id: Id
    custom_loss_seq_id: SeqId
    name: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    inputs: Annotated[list[CustomLossInput], Field(min_length=1, max_length=16)]
    graph: Json
    type: Literal["create_custom_loss"] = "create_custom_loss"

    def message(self) -> messages.CustomLoss:
        """Raises BadRequest."""
        names = [each.name for each in self.inputs]
        if names[0] != "logprobs" or self.inputs[0].rank == 0:
            raise BadRequest("inputs: the first one is logprobs, of rank 1 or 2")
        if len(set(names)) != len(names):
            raise BadRequest("inputs: two of them have the same name")
        graph = _encoded(self.graph)
        if len(graph) > MAX_GRAPH_BYTES:
            raise BadRequest(f"graph: {len(graph)} bytes; a custom loss has at most {MAX_GRAPH_BYTES}")
        return messages.CustomLoss(self.name, [(each.name, each.rank) for each in self.inputs], graph)


def _encoded(graph: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(graph)
    except orjson.JSONEncodeError as error:  # integers beyond 64 bits, or too deep
        raise BadRequest(f"graph: {error}") from None
