"""The losses' names and the keys of their config, for refusing what there is not before it is accepted.

The engine has the losses, and checks what the values are; a test holds this table equal to its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import BadRequest

PER_TOKEN = "return_per_token"
"""Of any loss: whether the answer has each token's. The server's business, not the engine's."""
_POLICY = (
    *("eps_clip", "eps_clip_high", "eps_clip_c", "icepop_beta", "use_tis", "tis_clip_low", "tis_clip_high"),
    "compute_kl_stats",
)
_THRESHOLDS = ("clip_low_threshold", "clip_high_threshold")
CONFIG_KEYS: dict[str, tuple[str, ...]] = {
    "cross_entropy": (),
    "importance_sampling": ("compute_kl_stats",),
    "ppo": _THRESHOLDS,
    "cispo": (*_THRESHOLDS, "compute_kl_stats"),
    "dro": ("beta",),
    "stable_reinforce": (
        *("mask_low_threshold", "mask_high_threshold", "truncation_threshold"),
        "kl_coeff",
    ),
    "gspo": _THRESHOLDS,
    "causallm_loss": (PER_TOKEN,),
    "policy_loss": _POLICY,
    "ppo_loss": _POLICY,
    "drgrpo": ("clip_low", "clip_high", "beta", "kl_type", "ratio_type"),
}
CUSTOM = "custom"  # a loss that a client has traced


def check_loss(name: str, config: Iterable[str]) -> None:
    """Raises BadRequest naming what there is."""
    if name == CUSTOM:
        return
    if name not in CONFIG_KEYS:
        raise BadRequest(f"loss_fn: unknown loss {name[:64]!r}; this server has {', '.join(CONFIG_KEYS)}")
    keys = CONFIG_KEYS[name]
    for key in config:
        if key not in (*keys, PER_TOKEN):
            takes = ", ".join(keys) or "none"
            raise BadRequest(f"loss_fn_config: unknown key {key[:64]!r} for loss {name!r}; it takes: {takes}")
