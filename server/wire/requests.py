"""JSON bodies of sessions, checkpoints and futures, as the union of what clients send.

The body of a search for sessions.

`create_custom_loss` bodies. What the graph calls is the engine's to judge.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import orjson
from pydantic import (
    AfterValidator,
    AliasChoices,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StringConstraints,
    model_validator,
)

from ...engine import messages
from ..errors import BadRequest
from ..ledger.tenancy import SAMPLING_ENGINE
from .body import Body, Id, Json, Label, Metadata, OfModel, SeqId, Sequenced, Tags, TextMetadata
from .models import LoraConfig, OptimizerConfig


class CreateSession(Body):
    """With `session_id`, `base_model` or `lora_config` also a model of the session's id."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "tags": ["rlve", "qwen"],
                    "user_metadata": {"experiment": "run_001"},
                    "sdk_version": "1.0.0",
                }
            ]
        }
    )
    tags: Tags = Field(default_factory=list)
    user_metadata: Metadata | None = None
    sdk_version: Label | None = None
    project_id: Label | None = None
    display_name: Label | None = None
    session_id: Id | None = None
    base_model: str | None = None
    lora_config: LoraConfig | None = None

    @model_validator(mode="after")
    def _sampling_engine(self) -> CreateSession:
        asked = (self.user_metadata or {}).get(SAMPLING_ENGINE, "auto")
        if asked not in get_args(messages.SamplingEngine):
            known = ", ".join(get_args(messages.SamplingEngine))
            raise ValueError(f"user_metadata.{SAMPLING_ENGINE}: {str(asked)[:64]!r} is none of {known}")
        return self


class SessionHeartbeat(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"session_id": "session-abc-123"}]})
    session_id: Id = Field(validation_alias=AliasChoices("session_id", "model_id"))


_DETAIL_CHARACTERS = 4096


class FinishReason(Body):
    type: Literal["success", "errored", "interrupted"] = "success"


class FinishSession(Body):
    reason: FinishReason = FinishReason()
    # A traceback, perhaps: of a long one its end is kept.
    detail: Annotated[str, AfterValidator(lambda text: text[-_DETAIL_CHARACTERS:])] | None = None


class SaveWeights(Sequenced):
    """`checkpoint_path`: a path on the client's side, of which the last part is the name."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model_id": "model-abc-123", "name": "checkpoint-step-100"}]}
    )
    path: str | None = Field(None, validation_alias=AliasChoices("path", "name"))
    checkpoint_path: str | None = None
    ttl_seconds: StrictInt | None = None
    overwrite: StrictBool = False
    user_metadata: TextMetadata | None = None

    @property
    def short_name(self) -> str | None:
        """None: none is said."""
        if self.path is None and self.checkpoint_path is not None:
            return self.checkpoint_path.rstrip("/").rpartition("/")[2]
        return self.path

    def kept(self) -> dict[str, Any]:
        """What of it `saves.new_checkpoint` takes."""
        return {name: getattr(self, name) for name in ("ttl_seconds", "overwrite", "user_metadata")}


class SaveWeightsForSampler(SaveWeights):
    sampling_session_seq_id: SeqId | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"


class SaveWeightsExternal(SaveWeights):
    """`merged`, which no SDK has: an adapter's weights inside its base model's, not beside them."""

    path: str = Field(validation_alias=AliasChoices("path", "name"))
    age_encryption_recipients: list[str] | None = None
    merged: StrictBool = False


class LoadWeights(Body):
    """Into a model that exists (`model_id`, `seq_id`), or as a new one (`session_id`, `model_seq_id`)."""

    path: str = Field(validation_alias=AliasChoices("path", "tinker_path", "xorl_path"))
    model_id: Id | None = None
    seq_id: Annotated[StrictInt, Field(ge=1, lt=1 << 31)] | None = None
    session_id: Id | None = None
    model_seq_id: SeqId | None = None
    optimizer: StrictBool = True
    base_model: str | None = None
    optimizer_config: OptimizerConfig | None = None
    user_metadata: Metadata | None = None


class JoinSamplingSession(Body):
    sampling_session_id: Id


class RetrieveFuture(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"request_id": "req-xyz-789"}]})
    request_id: str = Field(max_length=192)
    allow_metadata_only: bool = False


class SamplingSessionTarget(Body):
    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: Id
    cloned_sampler_id: SeqId = 0


class RetrieveFutures(Body):
    """`timeout`: seconds to wait for the first answer; None: as long as the server likes."""

    target: SamplingSessionTarget
    prev_cursor: SeqId = 0
    timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class CancelFuture(Body):
    request_id: str = Field(max_length=192)


class CleanupFutures(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"max_age_hours": 24}]})
    max_age_hours: Annotated[StrictInt, Field(ge=0, le=1 << 20)] = 24


class WeightsInfo(Body):
    """A checkpoint that is not there is a 404; asked for by `path`, `exists` is false."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"path": "tinker://model-abc-123/weights/checkpoint-step-100"}]}
    )
    tinker_path: str | None = Field(
        None, validation_alias=AliasChoices("tinker_path", "xorl_path", "model_path")
    )
    path: str | None = None

    @model_validator(mode="after")
    def _one(self) -> WeightsInfo:
        if (self.tinker_path is None) == (self.path is None):
            raise ValueError("send tinker_path, xorl_path or path")
        return self


class DeleteCheckpoint(OfModel):
    """`weights/<name>`, `weights/<model>/<name>` or a whole path; of `model_id` where it says no model."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model_id": "default", "checkpoint_id": "weights/step-100"}]}
    )

    checkpoint_id: str


class CopyWeights(Body):
    """As a run of `session_id` (its `model_seq_id`), or of a new session in a project."""

    source_path: str
    destination_project_id: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    session_id: Id | None = None
    model_seq_id: SeqId | None = None
    ttl_seconds: StrictInt | None = None


class Project(Body):
    project_id: Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Ttl(Body):
    ttl_seconds: StrictInt | None = None


class StepMetrics(Body):
    """A client's metrics of one step: at most 64 finite numbers, with names of at most 128 characters."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"step": 12, "metrics": {"reward": 0.75}}]})

    step: Annotated[StrictInt, Field(ge=0, lt=1 << 53)]
    metrics: Annotated[
        dict[
            Annotated[str, StringConstraints(min_length=1, max_length=128)],
            Annotated[float, Field(allow_inf_nan=False)],
        ],
        Field(min_length=1, max_length=64),
    ]


class SearchOwner(Body):
    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[str] = Field(default=[], max_length=10)


class Status(Body):
    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[Literal["success", "errored", "interrupted"]] | None = None

    def states(self) -> list[str]:
        """`active` and finish reasons. Here nobody cancels or fails a session but its client."""
        if self.type == "client_finished":
            return list(self.reasons or ("success", "errored", "interrupted"))
        return ["active"] if self.type == "active" else []


class SearchCursor(Body):
    last_created_at: str
    last_session_id: Id


class SearchSessions(Body):
    session_id: Id | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = Field(default={})
    display_name: Annotated[str, Field(min_length=1)] | None = None
    owner: SearchOwner = SearchOwner()
    statuses: list[Status] | None = None
    limit: Annotated[StrictInt, Field(ge=1, le=200)] = 50
    cursor: SearchCursor | None = None


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
