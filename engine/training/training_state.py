"""The state of one model in training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..messages import GradNormalization, LoraSpec, LossValue, TargetAlignment
from ..optimizers.optimizer_families import FAMILIES


@dataclass
class TrainingState:
    """The trained float32 weights (an adapter, or with `lora` None all of them), and what their steps need.

    `gradients` is None until something is accumulated. `valid_tokens` counts the accumulated tokens that the
    loss weighs (the divisor of `token_mean`). `failed_since_step` counts gradient computations that failed.
    `family` is the optimizer's, `optimizer_options` has its own options (`optimizer_families`).
    """

    lora: LoraSpec | None
    weights: Any
    optimizer: Any
    gradients: Any | None = None
    step: int = 0
    valid_tokens: int = 0
    failed_since_step: int = 0
    grad_normalization: GradNormalization = "sum"
    family: str = "adamw"
    target_alignment: TargetAlignment = "shifted"
    optimizer_options: dict[str, LossValue] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """The factor of the adapter's product: alpha / rank."""
        return 1.0 if self.lora is None else self.lora.alpha / self.lora.rank

    def arrays(self) -> dict[str, Any]:
        """Return all arrays, as in a checkpoint; `gradients` only if there are any."""
        arrays = {"weights": self.weights, "optimizer": self.optimizer._asdict()}
        return arrays if self.gradients is None else arrays | {"gradients": self.gradients}

    def metadata(self) -> dict[str, Any]:
        """The other fields, for JSON."""
        lora = self.lora and {name: getattr(self.lora, name) for name in self.lora.__struct_fields__}
        return {
            "lora": lora,
            "step": self.step,
            "valid_tokens": self.valid_tokens,
            "failed_since_step": self.failed_since_step,
            "grad_normalization": self.grad_normalization,
            "family": self.family,
            "target_alignment": self.target_alignment,
            "optimizer_options": self.optimizer_options,
            "has_gradients": self.gradients is not None,
        }

    @classmethod
    def from_checkpoint(cls, arrays: dict[str, Any], metadata: dict[str, Any]) -> TrainingState:
        """Return the state that these `arrays` and `metadata` describe."""
        metadata = dict(metadata)
        has_gradients = metadata.pop("has_gradients")
        lora = metadata.pop("lora")
        family = FAMILIES[
            metadata.setdefault("family", "adamw")
        ]  # checkpoints of earlier versions, which had only this one
        return cls(
            lora=None if lora is None else LoraSpec(**lora),
            weights=arrays["weights"],
            optimizer=family.state(**arrays["optimizer"]),
            gradients=arrays["gradients"] if has_gradients else None,
            **metadata,
        )
