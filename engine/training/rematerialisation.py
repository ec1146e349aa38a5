"""What the backward of a micro-batch keeps of the forward, and what it computes again.

Keeping everything is the fastest, and what is kept grows with the tokens of a micro-batch: a few rows of a
small model fit whole, a long row of a large one only with every block's input alone.
"""

from __future__ import annotations

from ...model.config import ModelConfig
from ..device_memory import device_share


def activation_bytes() -> int:
    """How much memory what is kept may take, by default: a quarter of an accelerator's (the rest is for
    weights, KV pages and gradients), 2 GiB on the CPU."""
    return device_share(1 / 4, on_cpu=2 << 30)


def kept_bytes(config: ModelConfig, tokens: int, itemsize: int, remat: str) -> int:
    """About what the blocks keep of `tokens` tokens (measured with SmolLM2-135M: within 5 %).

    Per layer and token, with D hidden, F feed-forward and Q = queries, keys and values together: "full" D
    (the block's input), "dots" 2 D + Q + 2 F (and the products with weights), "none" 8 D + 2 Q + 5 F.
    """
    elements, D = 0, config.hidden_size
    for layer in config.layers:
        Q, F = layer.mixer.qkv, layer.mlp.width
        elements += {"full": D, "dots": 2 * D + Q + 2 * F, "none": 8 * D + 2 * Q + 5 * F}[remat]
    return elements * tokens * itemsize


def choose_remat(config: ModelConfig, tokens: int, itemsize: int, limit: int) -> str:
    """The fastest of "none", "dots" and "full" that keeps at most `limit` bytes; "full" if none does."""
    return next(
        (r for r in ("none", "dots") if kept_bytes(config, tokens, itemsize, r) <= limit),
        "full",
    )
