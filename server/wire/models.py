"""Bodies that create, describe and remove models.

Server-side reinforcement learning with verifiable environments: what a client asks for, and says of it.

Names and defaults are those of tinkercloud's `rlve_config`; what only this server has is below them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

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
from .body import Body, Finite, Id, Metadata, OfModel, SeqId, as_json

Count = Annotated[StrictInt, Field(ge=1, le=100_000)]
EnvironmentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,64}$")]
PromptPreprocessor = Literal["TinyZero", "ChatTemplate_NoSystemPrompt"]
LossConfig = Annotated[
    dict[str, StrictBool | Finite | str | None], AfterValidator(as_json), Field(max_length=32)
]
AnswerMarker = Literal["<answer></answer>", "\\boxed{}", "none"]


class RlveConfig(Body):
    """A block that is not `enabled` asks for nothing."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "enabled": True,
                    "environment_list": ["chain_sum", "spell_backward"],
                    "initial_difficulty": 0,
                    "difficulty_sliding_window_size": 4,
                    "min_metric_to_increase_difficulty": 0.9,
                    "min_prompts_before_difficulty_check": 8,
                    "rollout_batch_size": 32,
                    "n_samples_per_prompt": 8,
                    "rollout_max_response_len": 512,
                    "rollout_temperature": 1.0,
                    "num_rollout": 500,
                }
            ]
        },
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
        """Prompts that are sampled at a time."""
        if not self.use_dynamic_sampling_filter:
            return self.rollout_batch_size
        return self.over_sampling_batch_size or self.rollout_batch_size

    @property
    def loss_config(self) -> dict[str, float | str]:
        given = {key: value for key, value in (self.loss_fn_config or {}).items() if value is not None}
        return {key: value if isinstance(value, str) else float(value) for key, value in given.items()}

    def kept(self) -> dict[str, Any]:
        """As JSON, of which `model_validate` makes it again."""
        return self.model_dump(mode="json")


Positive = Annotated[StrictInt, Field(ge=1, lt=1 << 31)]
Names = list[Annotated[str, Field(max_length=128)]]


class LoraConfig(Body):
    """`target_modules`: names of matrices, as PEFT has them; all of a kind or none."""

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
    """`learning_rate`, `weight_decay`, `betas` and `eps` are for steps that do not say them;
    `optimizer_kwargs` are the family's own."""

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
    """Metrics of the model as a run of Weights & Biases. The key is in memory only."""

    enabled: StrictBool = False
    project: Annotated[_Name, StringConstraints(pattern=r"^\w[\w.-]*$")] = "rlve"
    run_name: _Name | None = None
    group: _Name | None = None
    api_key: SecretStr | None = Field(None, max_length=256)

    @property
    def configuration(self) -> dict[str, str]:
        """What is kept of it."""
        kept = {"project": self.project, "run_name": self.run_name, "group": self.group}
        return {name: value for name, value in kept.items() if value is not None}


class CreateModel(Body):
    """A model of a session (`session_id`, `model_seq_id`); or one that the client names (`model_id`), which
    is opened again if it is there; or, with neither, one in a session of its own."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "session_id": "abc-123",
                    "model_seq_id": 0,
                    "model_name": "Qwen/Qwen2.5-7B-Instruct",
                    "lora_config": {
                        "rank": 32,
                        "train_mlp": True,
                        "train_attn": True,
                        "train_unembed": True,
                    },
                    "max_batch_size": 256,
                    "max_seq_len": 4096,
                    "debug_train_only": False,
                    "checkpoint_path": None,
                    "rlve_config": None,
                    "wandb_config": None,
                }
            ]
        }
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
    """`reset_weights`: the model is there again at once, as it was at its creation."""

    save_checkpoint: StrictBool = True
    reset_weights: StrictBool = False
