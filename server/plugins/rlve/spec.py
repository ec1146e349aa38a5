"""What of an `rlve_config` a model keeps, and what cannot be had."""

from __future__ import annotations

from typing import Any

from ...errors import BadRequest
from ...settings import Settings
from ...wire import requests as wire
from ...wire.requests import RlveConfig
from ...wire.training import check_loss

LOSSES = ("importance_sampling", "ppo", "cispo", "policy_loss", "ppo_loss", "drgrpo", "stable_reinforce")
"""Those that need no more of a token than its log-prob and its advantage."""
_NEED_REFERENCES = ("beta", "use_tis")


def rlve_of(
    body: wire.CreateModel, optimizer: str, settings: Settings, warnings: list[str]
) -> dict[str, Any] | None:
    """None: nothing is asked for. Raises BadRequest."""
    config = body.rlve_config
    if config is None or not config.enabled:
        return None
    if body.debug_train_only:
        raise BadRequest("rlve_config.enabled: a model of debug_train_only cannot be sampled from")
    if optimizer == "dimuon":
        raise BadRequest("rlve_config.enabled: steps of dimuon are the client's alone; choose adamw or muon")
    _check(config)
    if config.n_samples_per_prompt > settings.max_samples:
        raise BadRequest(
            f"rlve_config.n_samples_per_prompt: {config.n_samples_per_prompt} is over the limit of "
            f"{settings.max_samples}"
        )
    datums, most = config.rollout_batch_size * config.n_samples_per_prompt, settings.max_datums
    if body.max_batch_size is not None:
        most = min(most, body.max_batch_size)
    if datums > most:
        raise BadRequest(
            f"rlve_config: rollout_batch_size times n_samples_per_prompt is {datums}, over the {most} datums "
            "that the model takes at a time"
        )
    if not config.balance_data:
        warnings.append("rlve_config.balance_data: sequences are always packed by their lengths here")
    if config.partial_rollout:
        warnings.append("rlve_config.partial_rollout: every sample is finished in its own step here")
    if config.over_sampling_batch_size is not None and not config.use_dynamic_sampling_filter:
        warnings.append(
            "rlve_config.over_sampling_batch_size: without use_dynamic_sampling_filter every prompt is "
            "trained on, and no others are sampled"
        )
    return config.kept()


def _check(config: RlveConfig) -> None:
    if config.n_samples_per_prompt < 2:
        raise BadRequest("rlve_config.n_samples_per_prompt: a sample is compared with others; send 2 or more")
    if config.rollout_temperature == 0:
        raise BadRequest("rlve_config.rollout_temperature: at 0 all samples of a prompt are the same")
    check_loss(config.loss_fn, config.loss_config)
    if config.loss_fn not in LOSSES:
        raise BadRequest(
            f"rlve_config.loss_fn: {config.loss_fn} needs what there is not here; send one of "
            f"{', '.join(LOSSES)}"
        )
    for key in _NEED_REFERENCES:
        if config.loss_config.get(key):
            raise BadRequest(f"rlve_config.loss_fn_config: {key} needs log-probs of another model")
