"""Server-side reinforcement learning with verifiable environments: what a client asks for, and says of it.

Names and defaults are those of tinkercloud's `rlve_config`; what only this server has is below them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StringConstraints,
    model_validator,
)

from .body import Body, Finite, as_json

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
