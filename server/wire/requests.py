"""JSON bodies about sessions, models, checkpoints, futures and inference servers, as clients send them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import orjson
from pydantic import (
    AfterValidator,
    AliasChoices,
    ConfigDict,
    Field,
    SecretStr,
    StrictBool,
    StrictInt,
    StringConstraints,
    model_validator,
)

from ...engine import messages
from ..addresses import plain_host
from ..errors import BadRequest
from ..ledger.tenancy import SAMPLING_ENGINE
from . import (
    Body,
    Finite,
    Id,
    Json,
    Label,
    Metadata,
    OfModel,
    SeqId,
    Sequenced,
    Tags,
    TextMetadata,
    as_json,
    example,
)

Count = Annotated[StrictInt, Field(ge=1, le=100_000)]
EnvironmentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,64}$")]
PromptPreprocessor = Literal["TinyZero", "ChatTemplate_NoSystemPrompt"]
LossConfig = Annotated[
    dict[str, StrictBool | Finite | str | None], AfterValidator(as_json), Field(max_length=32)
]
AnswerMarker = Literal["<answer></answer>", "\\boxed{}", "none"]


class RlveConfig(Body):
    """Training with verifiable environments that the server does itself. A block that is not `enabled` has no
    effect. The names and defaults down to `partial_rollout` are those of tinkercloud's `rlve_config`; the
    others are extensions."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra=example(
            enabled=True,
            environment_list=["chain_sum", "spell_backward"],
            initial_difficulty=0,
            difficulty_sliding_window_size=4,
            min_metric_to_increase_difficulty=0.9,
            min_prompts_before_difficulty_check=8,
            rollout_batch_size=32,
            n_samples_per_prompt=8,
            rollout_max_response_len=512,
            rollout_temperature=1.0,
            num_rollout=500,
        ),
    )
    enabled: StrictBool = False
    environment_list: list[EnvironmentName] = Field(
        default_factory=list,
        max_length=256,
        description="of reasoning-gym; one that is named twice is drawn twice as often",
    )
    custom_prompt_preprocessor: PromptPreprocessor = "TinyZero"
    answer_marker_type: AnswerMarker = Field(
        "<answer></answer>", description="none: the whole response is the answer"
    )
    initial_difficulty: Annotated[StrictInt, Field(ge=0, le=1000)] = 0
    difficulty_sliding_window_size: Count = 4
    min_metric_to_increase_difficulty: Annotated[Finite, Field(ge=0, le=1)] = 0.9
    min_prompts_before_difficulty_check: Count = 8
    rollout_batch_size: Annotated[StrictInt, Field(ge=1, le=4096)] = Field(
        32, description="prompts that a step trains on"
    )
    n_samples_per_prompt: Annotated[StrictInt, Field(ge=1, le=1024)] = 8
    rollout_max_response_len: Annotated[StrictInt, Field(ge=1, le=1 << 20)] = 4096
    rollout_temperature: Annotated[Finite, Field(ge=0, le=2)] = 1.0
    use_dynamic_sampling_filter: StrictBool = Field(
        True, description="leave out prompts whose samples all have the same reward, and sample others"
    )
    over_sampling_batch_size: Annotated[StrictInt, Field(ge=1, le=4096)] | None = Field(
        None, description="prompts that are sampled at a time while the filter is on; rollout_batch_size"
    )
    num_rollout: Count = Field(500, description="steps")
    balance_data: StrictBool = True
    partial_rollout: StrictBool = False

    seed: Annotated[StrictInt, Field(ge=0, lt=1 << 62)] = 0
    reward_key: Literal["reward", "accuracy"] = "reward"
    learning_rate: Annotated[Finite, Field(ge=0)] | None = Field(
        None, description="that of optimizer_config, or optim_step's default"
    )
    loss_fn: Annotated[str, Field(max_length=64)] = "importance_sampling"
    loss_fn_config: LossConfig | None = None

    @model_validator(mode="after")
    def _known(self) -> RlveConfig:
        if self.enabled and self.model_extra:
            raise ValueError(f"no such fields: {', '.join(sorted(self.model_extra))[:200]}")
        if self.enabled and not self.environment_list:
            raise ValueError("environment_list: name at least one environment")
        return self

    @property
    def wave(self) -> int:
        """The number of prompts that are sampled at a time."""
        if not self.use_dynamic_sampling_filter:
            return self.rollout_batch_size
        return self.over_sampling_batch_size or self.rollout_batch_size

    @property
    def loss_config(self) -> dict[str, float | str]:
        given = {key: value for key, value in (self.loss_fn_config or {}).items() if value is not None}
        return {key: value if isinstance(value, str) else float(value) for key, value in given.items()}

    def kept(self) -> dict[str, Any]:
        """Return it as JSON that `model_validate` reads again."""
        return self.model_dump(mode="json")


Positive = Annotated[StrictInt, Field(ge=1, lt=1 << 31)]
Names = list[Annotated[str, Field(max_length=128)]]


class LoraConfig(Body):
    """The adapter to train. `target_modules`: names of matrices, as PEFT has them; all of a kind or none."""

    model_config = ConfigDict(extra="allow")
    rank: StrictInt = Field(32, ge=0, validation_alias=AliasChoices("rank", "lora_rank"))
    alpha: Finite | None = Field(None, ge=0, validation_alias=AliasChoices("alpha", "lora_alpha"))
    dropout: Finite | None = Field(None, ge=0, le=1)
    seed: StrictInt | None = None
    train_unembed: StrictBool = True
    train_mlp: StrictBool = True
    train_attn: StrictBool = True
    target_modules: Names | None = Field(None, max_length=64)


class OptimizerConfig(Body):
    """A model's optimizer. `learning_rate`, `weight_decay`, `betas` and `eps` are defaults for steps without
    them; `optimizer_kwargs` are the family's own options."""

    model_config = ConfigDict(extra="allow")
    type: str = "adamw"
    learning_rate: Finite | None = Field(None, ge=0)
    weight_decay: Finite | None = Field(None, ge=0)
    betas: tuple[Annotated[Finite, Field(ge=0, lt=1)], Annotated[Finite, Field(ge=0, lt=1)]] | None = None
    eps: Finite | None = Field(None, ge=0)
    optimizer_dtype: Literal["fp32", "float32", "bf16", "bfloat16"] | None = None
    optimizer_kwargs: dict[str, StrictBool | Finite | str] | None = Field(None, max_length=32)


class ParallelismConfig(Body):
    tensor_parallel_size: Positive = 1
    pipeline_parallel_size: Positive = 1
    num_gpus: Positive | None = None


_Name = Annotated[str, StringConstraints(min_length=1, max_length=128), AfterValidator(as_json)]


class WandbConfig(Body):
    """A run of Weights & Biases for the model's metrics. The key is kept in memory only."""

    enabled: StrictBool = False
    project: Annotated[_Name, StringConstraints(pattern=r"^\w[\w.-]*$")] = "rlve"
    run_name: _Name | None = None
    group: _Name | None = None
    api_key: SecretStr | None = Field(None, max_length=256)

    @property
    def configuration(self) -> dict[str, str]:
        """The fields that are kept with the model."""
        kept = {"project": self.project, "run_name": self.run_name, "group": self.group}
        return {name: value for name, value in kept.items() if value is not None}


class CreateModel(Body):
    """A model of a session (`session_id`, `model_seq_id`), or one that the client names (`model_id`), which
    is opened again if it exists, or, with neither, one in a session of its own."""

    model_config = ConfigDict(
        json_schema_extra=example(
            session_id="abc-123",
            model_seq_id=0,
            model_name="Qwen/Qwen2.5-7B-Instruct",
            lora_config={"rank": 32, "train_mlp": True, "train_attn": True, "train_unembed": True},
            max_batch_size=256,
            max_seq_len=4096,
            debug_train_only=False,
            checkpoint_path=None,
            rlve_config=None,
            wandb_config=None,
        )
    )
    session_id: Id | None = None
    model_seq_id: SeqId | None = None
    model_id: Id | None = None
    base_model: str | None = None
    model_name: str | None = Field(None, description="another name for base_model")
    lora_config: LoraConfig | None = None
    optimizer_config: OptimizerConfig | None = None
    user_metadata: Metadata | None = None
    checkpoint_path: str | None = Field(None, description="start from this training checkpoint")
    grad_normalization: messages.GradNormalization | None = None
    target_alignment: messages.TargetAlignment | None = None
    max_batch_size: Positive | None = Field(None, description="datums per request, at most")
    max_seq_len: Positive | None = Field(None, description="tokens per datum, at most")
    debug_train_only: StrictBool = Field(False, description="the model is never sampled from")
    staleness_k: Annotated[StrictInt, Field(ge=0)] = Field(
        0, description="versions that samples may lag behind; here they never do"
    )
    parallelism_config: ParallelismConfig | None = None
    objective: Literal["language_modeling", "sequence_classification", "token_classification"] = (
        "language_modeling"
    )
    num_labels: StrictInt | None = None
    head_config: dict[str, Any] | None = None
    rlve_config: RlveConfig | None = None
    wandb_config: WandbConfig | None = None

    @model_validator(mode="after")
    def _one_base_model(self) -> CreateModel:
        if self.base_model and self.model_name and self.base_model != self.model_name:
            raise ValueError(
                f"base_model {self.base_model!r} and model_name {self.model_name!r} are two names for the "
                "same; send one"
            )
        if (self.base_model or self.model_name) is None:
            raise ValueError("base_model (or model_name): missing")
        if (self.session_id is None) != (self.model_seq_id is None) and self.model_id is None:
            raise ValueError("session_id and model_seq_id come together")
        return self

    @property
    def base(self) -> str:
        return self.base_model or self.model_name or ""


class KillSession(OfModel):
    """A model to unload. With `reset_weights` a new one is created at once, as it was."""

    save_checkpoint: StrictBool = True
    reset_weights: StrictBool = False


class CreateSession(Body):
    """A session; with `session_id`, `base_model` or `lora_config` also a model of the same name."""

    model_config = ConfigDict(
        json_schema_extra=example(
            tags=["rlve", "qwen"], user_metadata={"experiment": "run_001"}, sdk_version="1.0.0"
        )
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
        engine = (self.user_metadata or {}).get(SAMPLING_ENGINE, "auto")
        if engine not in get_args(messages.SamplingEngine):
            known = ", ".join(get_args(messages.SamplingEngine))
            raise ValueError(f"user_metadata.{SAMPLING_ENGINE}: {str(engine)[:64]!r} is none of {known}")
        return self


class SessionHeartbeat(Body, json_schema_extra=example(session_id="session-abc-123")):
    session_id: Id = Field(validation_alias=AliasChoices("session_id", "model_id"))


_DETAIL_CHARACTERS = 4096


class FinishReason(Body):
    type: Literal["success", "errored", "interrupted"] = "success"


class FinishSession(Body):
    reason: FinishReason = FinishReason()
    # A traceback, perhaps: of a long one its end is kept.
    detail: Annotated[str, AfterValidator(lambda text: text[-_DETAIL_CHARACTERS:])] | None = None


class SaveWeights(Sequenced, json_schema_extra=example(model_id="model-abc-123", name="checkpoint-step-100")):
    """A checkpoint to save. `checkpoint_path`: a path on the client's side, whose last part is the name."""

    path: str | None = Field(None, validation_alias=AliasChoices("path", "name"))
    checkpoint_path: str | None = None
    ttl_seconds: StrictInt | None = None
    overwrite: StrictBool = False
    user_metadata: TextMetadata | None = None

    @property
    def short_name(self) -> str | None:
        """The checkpoint's name; None if the client gives none."""
        if self.path is None and self.checkpoint_path is not None:
            return self.checkpoint_path.rstrip("/").rpartition("/")[2]
        return self.path

    def kept(self) -> dict[str, Any]:
        """Return the fields that `Saves.checkpoint` takes."""
        return {name: getattr(self, name) for name in ("ttl_seconds", "overwrite", "user_metadata")}


class SaveWeightsForSampler(SaveWeights):
    sampling_session_seq_id: SeqId | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"


class SaveWeightsExternal(SaveWeights):
    """Files to write. `merged` and `experts` are extensions. `merged`: write full weights, the base model's
    with the adapter in them. `experts`: the form of the adapters of a mixture's experts. `shared` is the
    hosted service's, which the cookbook and SGLang read; `per_expert` has tensors for every expert, and
    `target_parameters` is PEFT's form for stacked experts."""

    path: str = Field(validation_alias=AliasChoices("path", "name"))
    age_encryption_recipients: list[str] | None = None
    merged: StrictBool = False
    experts: Literal["shared", "per_expert", "target_parameters"] = "shared"


class LoadWeights(Body):
    """A checkpoint to load into a model (`model_id`, `seq_id`), or as a new one (`session_id`,
    `model_seq_id`)."""

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


class RetrieveFuture(Body, json_schema_extra=example(request_id="req-xyz-789")):
    request_id: str = Field(max_length=192)
    allow_metadata_only: bool = False


class SamplingSessionTarget(Body):
    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: Id
    cloned_sampler_id: SeqId = 0


class RetrieveFutures(Body):
    """A poll of a sampling session. `timeout`: seconds to wait for the first answer; None: as long as the
    server likes."""

    target: SamplingSessionTarget
    prev_cursor: SeqId = 0
    timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class CancelFuture(Body):
    request_id: str = Field(max_length=192)


class CleanupFutures(Body, json_schema_extra=example(max_age_hours=24)):
    max_age_hours: Annotated[StrictInt, Field(ge=0, le=1 << 20)] = 24


class WeightsInfo(Body, json_schema_extra=example(path="tinker://model-abc-123/weights/checkpoint-step-100")):
    """A checkpoint to describe. If it does not exist, the answer is 404, or, asked for by `path`, `exists` is
    false."""

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
    """A checkpoint to delete: `weights/<name>`, `weights/<model>/<name>` or a whole path. `model_id`: its
    model, if it names none."""

    model_config = ConfigDict(json_schema_extra=example(model_id="default", checkpoint_id="weights/step-100"))
    checkpoint_id: str


class CopyWeights(Body):
    """A checkpoint to copy: as a run of `session_id` (its `model_seq_id`), or of a new session in a
    project."""

    source_path: str
    destination_project_id: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    session_id: Id | None = None
    model_seq_id: SeqId | None = None
    ttl_seconds: StrictInt | None = None


class Project(Body):
    project_id: Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Ttl(Body):
    ttl_seconds: StrictInt | None = None


class StepMetrics(Body, json_schema_extra=example(step=12, metrics={"reward": 0.75})):
    """A client's metrics of one step: at most 64 finite numbers, with names of at most 128 characters."""

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
        """Return `active` and finish reasons. Only its client ends a session here: none is cancelled or
        failed."""
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
        """Return the loss as the engine takes it. Raises BadRequest."""
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


Port = Annotated[StrictInt, Field(ge=1, le=65535)]
Host = Annotated[
    str,
    StringConstraints(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9._:\[\]-]+$"),
    AfterValidator(plain_host),
]
Word = Annotated[str, StringConstraints(max_length=128)]


class Endpoint(Body, json_schema_extra=example(host="10.0.0.2", port=30000)):
    host: Host
    port: Port


class AddEndpoint(Endpoint):
    worker_port: Port | None = None
    world_size: Annotated[StrictInt, Field(ge=1, le=1 << 16)] = 1
    pool: Word = "default"
    receiver_kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"] | None = None
    sync_weights: StrictBool = False
    master_address: Word | None = None
    master_port: Annotated[StrictInt, Field(ge=0, le=65535)] = 0
    group_name: Word = "weight_sync_group"
    buffer_size_mb: Annotated[StrictInt, Field(ge=1, le=1 << 20)] = 1024
    # Extensions: its key, and which of this server's base models it has, where its own name does not say.
    api_key: Annotated[str, StringConstraints(max_length=512, pattern=r"^[!-~]+$")] | None = None
    base_model: Word | None = None


class SyncWeights(Body, json_schema_extra=example(model_id="default")):
    model_id: Id | None = None
    master_address: Word = ""
    master_port: Annotated[StrictInt, Field(ge=0, le=65535)] = 0
    group_name: Word = "weight_sync_group"
    buffer_size_mb: Annotated[StrictInt, Field(ge=1, le=1 << 20)] = 1024
    flush_cache: StrictBool = False
    cache_invalidation_mode: Literal["auto", "flush", "none"] = "auto"
    pause_mode: Literal["retract", "abort", "in_place"] = "retract"
    weight_version: Word | None = None
    quantization: dict[str, Any] | None = None
    pools: Annotated[list[Word], Field(max_length=64)] | None = None
    # Extensions: other weights than a model's as they are now.
    model_path: Annotated[str, StringConstraints(max_length=1024)] | None = None
    base_model: Word | None = None


class Quantization(Body):
    quant_method: Literal["fp8", "none"]
    fmt: Literal["e4m3"] = "e4m3"
    weight_block_size: (
        Annotated[StrictInt, Field(ge=1, le=4096)]
        | tuple[Annotated[StrictInt, Field(ge=1, le=4096)], Annotated[StrictInt, Field(ge=1, le=4096)]]
        | None  # one scale for a whole matrix
    ) = (128, 128)
    modules_to_not_convert: Annotated[list[Word], Field(max_length=256)] = Field(default_factory=list)
    activation_scheme: Literal["dynamic"] = "dynamic"


class SetQuantization(Body):
    """A format for syncs. null, {} or the method `none` send weights as they are."""

    model_config = ConfigDict(
        json_schema_extra=example(quantization={"quant_method": "fp8", "weight_block_size": [128, 128]})
    )
    quantization: Annotated[dict[str, Any], Field(max_length=16)] | None = None
