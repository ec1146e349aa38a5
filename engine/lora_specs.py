"""LoRA configurations: which the engine trains, and which can take each other's weights."""

from __future__ import annotations

from .errors import UserError
from .messages import EngineConfig, LoraSpec
from .training.validation import FLOAT32_MAX


def check(lora: LoraSpec | None, config: EngineConfig) -> None:
    """Raise UserError for an adapter that this engine does not train."""
    if lora is None:
        if not config.full_weight:
            raise UserError(
                "full-weight training is not enabled on this server; give a lora_config with a rank"
            )
        return
    if not 1 <= lora.rank <= config.max_rank:
        raise UserError(f"lora rank {lora.rank}: it must be between 1 and {config.max_rank}")
    if not 0 < lora.alpha <= FLOAT32_MAX:
        raise UserError(f"lora alpha {lora.alpha}: it must be a positive number of float32")
    if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
        raise UserError("nothing would be trained: set train_attn, train_mlp or train_unembed")


def shape(lora: LoraSpec | None) -> tuple | None:
    """Return what must be equal for one adapter to take another's weights."""
    if lora is None:
        return None
    return (lora.rank, lora.alpha, lora.train_attn, lora.train_mlp, lora.train_unembed)


def matrices(lora: LoraSpec | None) -> tuple | None:
    """Return what must be equal for one adapter to replace another: everything but the scale."""
    return None if lora is None else (lora.rank, lora.train_attn, lora.train_mlp, lora.train_unembed)


def described(lora: LoraSpec | None) -> str:
    if lora is None:
        return "full weights"
    trained = [name for name in ("attn", "mlp", "unembed") if getattr(lora, f"train_{name}")]
    return f"LoRA of rank {lora.rank}, alpha {lora.alpha:g} on {', '.join(trained)}"
