"""JSON bodies, as the union of what clients send. Unknown keys are ignored.

Where two spellings mean the same, both are taken (`AliasChoices`).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictInt,
    StringConstraints,
    ValidationError,
    model_validator,
)

from ...engine import messages
from ..errors import BadRequest, describe
from .tensors import check_csr

Id = Annotated[str, StringConstraints(min_length=1, max_length=192)]
SeqId = Annotated[StrictInt, Field(ge=0, lt=1 << 62)]
Int64 = Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 63)]  # larger numbers cannot be sent on
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _as_json(value: Any) -> Any:
    """The value, if answers can show it: JSON in UTF-8, without NaN and lone surrogates."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise ValueError("not JSON in UTF-8: NaN, infinity, half a character, or nested too deeply") from None
    return value


Metadata = Annotated[dict[str, Any], AfterValidator(_as_json)]


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", populate_by_name=True, protected_namespaces=())


class CreateSession(Body):
    tags: list[str] = []
    user_metadata: Metadata | None = None
    sdk_version: str | None = None
    project_id: str | None = None
    display_name: str | None = None


class SessionHeartbeat(Body):
    session_id: Id


class FinishReason(Body):
    type: Literal["success", "errored", "interrupted"] = "success"


class FinishSession(Body):
    reason: FinishReason = FinishReason()
    detail: str | None = None


class LoraConfig(Body):
    rank: StrictInt = Field(32, ge=0, validation_alias=AliasChoices("rank", "lora_rank"))
    seed: StrictInt | None = None
    train_unembed: StrictBool = True
    train_mlp: StrictBool = True
    train_attn: StrictBool = True


class OptimizerConfig(Body):
    model_config = ConfigDict(extra="allow")
    type: str = "adamw"


class CreateModel(Body):
    session_id: Id
    model_seq_id: SeqId
    base_model: str
    lora_config: LoraConfig | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()
    user_metadata: Metadata | None = None


class GetInfo(Body):
    model_id: Id


class AdamParams(Body):
    learning_rate: Finite = Field(1e-4, ge=0)
    beta1: Finite = Field(0.9, ge=0, lt=1)
    beta2: Finite = Field(0.95, ge=0, lt=1)
    eps: Finite = Field(1e-12, ge=0)
    weight_decay: Finite = Field(0.0, ge=0)
    grad_clip_norm: Finite = Field(0.0, ge=0)


class DimuonParams(Body):
    model_config = ConfigDict(extra="forbid")
    type: Literal["dimuon"]
    learning_rate: Finite = Field(ge=0)
    beta1: Finite = Field(0.9, ge=0, lt=1)
    grad_clip_norm: Finite = 0.0  # below 0: off

    def message(self) -> messages.DimuonParams:
        return messages.DimuonParams(**self.model_dump(exclude={"type"}))


class Sequenced(Body):
    """An operation of a model. Without a seq_id it comes after all that have arrived."""

    model_id: Id
    seq_id: Annotated[StrictInt, Field(ge=1, lt=1 << 31)] | None = None


class OptimStep(Sequenced):
    adam_params: AdamParams | None = None
    optimizer_params: dict[str, Any] | None = None

    _params: AdamParams | DimuonParams = PrivateAttr(default_factory=AdamParams)

    @model_validator(mode="after")
    def _either(self) -> OptimStep:
        families: dict[str, type[AdamParams | DimuonParams]] = {"adamw": AdamParams, "dimuon": DimuonParams}
        family = families.get(self.family)
        if self.adam_params is not None:
            self._params = self.adam_params
        elif self.optimizer_params and family is not None:
            try:
                self._params = family.model_validate(self.optimizer_params)
            except ValidationError as error:
                raise ValueError(f"optimizer_params: {describe([*map(dict, error.errors())])}") from None
        return self

    @property
    def family(self) -> str:
        """Whose parameters these are; perhaps one that there is not."""
        if self.adam_params is not None:
            return "adamw"
        return str((self.optimizer_params or {}).get("type", "adamw"))[:64]

    def message(self) -> messages.OptimStep:
        """Without a request id."""
        if isinstance(self._params, DimuonParams):
            return messages.OptimStep("", self.model_id, dimuon=self._params.message())
        return messages.OptimStep("", self.model_id, messages.AdamParams(**self._params.model_dump()))


UserMetadata = dict[str, str]


class SaveWeights(Sequenced):
    path: str | None = Field(None, validation_alias=AliasChoices("path", "name"))
    ttl_seconds: StrictInt | None = None
    overwrite: StrictBool = False
    user_metadata: UserMetadata | None = None


class SaveWeightsForSampler(SaveWeights):
    sampling_session_seq_id: SeqId | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"


class SaveWeightsExternal(SaveWeights):
    path: str = Field(validation_alias=AliasChoices("path", "name"))
    age_encryption_recipients: list[str] | None = None


class LoadWeights(Body):
    """Into a model that exists (`model_id`, `seq_id`), or as a new one (`session_id`, `model_seq_id`)."""

    path: str
    model_id: Id | None = None
    seq_id: Annotated[StrictInt, Field(ge=1, lt=1 << 31)] | None = None
    session_id: Id | None = None
    model_seq_id: SeqId | None = None
    optimizer: StrictBool = True
    base_model: str | None = None
    optimizer_config: OptimizerConfig | None = None
    user_metadata: Metadata | None = None


class CreateSamplingSession(Body):
    session_id: Id
    sampling_session_seq_id: SeqId
    base_model: str | None = None
    model_path: str | None = None


class JoinSamplingSession(Body):
    sampling_session_id: Id


class Chunk(Body):
    type: str = "encoded_text"
    tokens: list[StrictInt] | None = None


class Prompt(Body):
    chunks: list[Chunk] | None = None
    tokens: list[StrictInt] | None = None
    input_ids: list[StrictInt] | None = None


class SamplingParams(Body):
    max_tokens: Annotated[Int64, Field(ge=1)] | None = None
    seed: StrictInt | None = None
    stop: Annotated[str | list[str] | list[Int64] | None, AfterValidator(_as_json)] = None
    temperature: Finite = Field(default=1.0, ge=0)
    top_k: Int64 = Field(default=-1, ge=-1)
    top_p: Finite = Field(default=1.0, gt=0, le=1)
    # What follows no SDK has: extensions for plain HTTP.
    min_p: Finite = Field(default=0.0, ge=0, le=1)
    repetition_penalty: Finite = Field(default=1.0, ge=0.01, le=100)
    presence_penalty: Finite = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: Finite = Field(default=0.0, ge=-2, le=2)

    def message(self) -> messages.SamplingParams:
        stop_strings: list[str] = []
        stop_tokens: list[int] | None = None  # absent: the model's own
        if isinstance(self.stop, str):
            stop_strings = [self.stop]
        elif self.stop is not None:
            stop_strings = [stop for stop in self.stop if isinstance(stop, str)]
            stop_tokens = [stop for stop in self.stop if isinstance(stop, int)]
            if stop_strings:
                stop_tokens = None
        return messages.SamplingParams(
            max_tokens=self.max_tokens,
            # Any integer is a seed; the engine's have 64 bits.
            seed=None if self.seed is None else self.seed % (1 << 64),
            stop_strings=stop_strings,
            stop_tokens=stop_tokens,
            temperature=self.temperature,
            top_k=-1 if self.top_k == 0 else self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )


class TargetTokens(Body):
    """int64 [prompt_len - 1, K], dense or, with both kinds of indices, compressed sparse rows."""

    data: list[Int64]
    dtype: Literal["int64"] = "int64"
    shape: tuple[Int64, Int64]
    sparse_crow_indices: list[Int64] | None = None
    sparse_col_indices: list[Int64] | None = None

    def message(self) -> messages.PromptCells:
        """Raises BadRequest where data, shape and indices do not agree."""
        where = "target_prompt_logprobs"
        rows, columns = self.shape
        outside = next((token for token in self.data if not -1 <= token < 1 << 31), None)
        if outside is not None:
            raise BadRequest(f"{where}: {outside} is no token id, nor -1 for nothing")
        values = np.asarray(self.data, "<i4").tobytes()
        if self.sparse_crow_indices is None or self.sparse_col_indices is None:
            if self.sparse_crow_indices is not self.sparse_col_indices:
                raise BadRequest(f"{where}: sparse_crow_indices and sparse_col_indices come together")
            if min(rows, columns) < 0 or rows * columns != len(self.data):
                raise BadRequest(f"{where}: shape {[rows, columns]} does not hold {len(self.data)} values")
            return messages.PromptCells((rows, columns), values)
        crow, cols = (np.asarray(i, "<i8") for i in (self.sparse_crow_indices, self.sparse_col_indices))
        check_csr(len(self.data), (rows, columns), crow, cols, where)
        return messages.PromptCells((rows, columns), values, crow.tobytes(), cols.tobytes())


class Sample(Body):
    prompt: Prompt
    num_samples: StrictInt = Field(1, ge=1)
    sampling_params: SamplingParams = SamplingParams()
    sampling_session_id: Id | None = None
    seq_id: SeqId | None = None
    base_model: str | None = None
    model_path: str | None = None
    prompt_logprobs: StrictBool | None = False
    topk_prompt_logprobs: StrictInt = Field(0, ge=0, le=messages.TOPK_LIMIT)
    topk_sample_logprobs: StrictInt = Field(0, ge=0, le=messages.TOPK_LIMIT)
    target_prompt_logprobs: TargetTokens | None = None
    prompt_alt_tokens_k: StrictInt | None = Field(0, ge=0, le=messages.ALTERNATIVES_LIMIT)
    prompt_logprobs_last_n: Int64 | None = Field(None, ge=1)


class RetrieveFuture(Body):
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


class WeightsInfo(Body):
    tinker_path: str = Field(validation_alias=AliasChoices("tinker_path", "path"))


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


def prompt_tokens(prompt: Prompt, vocab_size: int, max_length: int) -> bytes:
    """int32 tokens. Raises BadRequest naming the chunk."""
    tokens: list[int] = []
    if prompt.chunks is not None:
        for index, chunk in enumerate(prompt.chunks):
            if chunk.type != "encoded_text" or chunk.tokens is None:
                raise BadRequest(
                    f"prompt: chunk {index}: {chunk.type} is not supported here; send encoded_text"
                )
            tokens += chunk.tokens
    else:
        tokens = prompt.tokens or prompt.input_ids or []
    if not tokens:
        raise BadRequest("prompt: no tokens; send at least one")
    if len(tokens) > max_length:
        raise BadRequest(f"prompt: {len(tokens)} tokens are over the model's limit of {max_length}")
    for position, token in enumerate(tokens):
        if not 0 <= token < (vocab_size or 1 << 31):
            raise BadRequest(
                f"prompt: token {token} at position {position} is outside the vocabulary [0, {vocab_size})"
            )
    return np.asarray(tokens, "<i4").tobytes()
