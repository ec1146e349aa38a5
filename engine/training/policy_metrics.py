"""Metrics of policy losses about the sampler and the learner, from log-probs that exist anyway."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .validation import ChosenLoss, TrainingDatum


def policy_metrics(
    chosen: ChosenLoss, data: Sequence[TrainingDatum], logprobs: Sequence[np.ndarray]
) -> dict[str, float]:
    """Return the metrics over the valid tokens of all datums; none for a loss without the sampler's
    log-probs.

    With `compute_kl_stats`: Schulman's k3 estimate of the divergence of the sampler from the learner, the
    sampler's entropy, and the mean ratio, named as in xorl.
    """
    loss = chosen.loss
    if "logprobs" not in loss.required_inputs:
        return {}
    kept = [datum.inputs[loss.valid] != 0 for datum in data]
    learner = np.concatenate(
        [
            values.reshape(datum.targets.shape)[at]
            for values, datum, at in zip(logprobs, data, kept, strict=True)
        ]
    )
    inputs = {
        name: np.concatenate([datum.inputs[name][at] for datum, at in zip(data, kept, strict=True)])
        for name in data[0].inputs
    }
    difference = learner - inputs["logprobs"]
    inputs["log_ratio"] = _of_sequences(data, logprobs, kept) if loss.sequence_level else difference
    # an estimate of the divergence of the sampler from the learner: the mean log-ratio's negative
    metrics = {"kl_sampled:sum": float(-difference.sum(dtype=np.float64))}
    if not len(difference):
        return metrics
    with np.errstate(over="ignore"):  # a clipped token's ratio may overflow
        metrics |= _means(chosen, learner, inputs, difference)
    largest = np.finfo(np.float64).max
    return {
        name: float(np.nan_to_num(value, posinf=largest, neginf=-largest)) for name, value in metrics.items()
    }


def _of_sequences(
    data: Sequence[TrainingDatum], logprobs: Sequence[np.ndarray], kept: Sequence[np.ndarray]
) -> np.ndarray:
    """Return, for each valid token, the mean log-ratio over the ratio mask of its datum (`losses.gspo`)."""
    means = []
    for datum, values, at in zip(data, logprobs, kept, strict=True):
        mask = datum.inputs["sequence_ratio_mask"] != 0
        log_ratio = (values.reshape(datum.targets.shape) - datum.inputs["logprobs"])[mask]
        means.append(np.full(int(at.sum()), log_ratio.mean() if log_ratio.size else 0.0, np.float32))
    return np.concatenate(means)


def _means(
    chosen: ChosenLoss, learner: np.ndarray, inputs: dict[str, np.ndarray], difference: np.ndarray
) -> dict[str, float]:
    loss = chosen.loss
    ratio = np.exp(difference, dtype=np.float64)
    metrics = {"ratio:min": float(ratio.min()), "ratio:max": float(ratio.max())}
    if "compute_kl_stats" in chosen.reports:
        metrics["kl_sample_train_k3:mean"] = float((ratio - 1 - difference).mean())
        metrics["entropy_sample:mean"] = float(-inputs["logprobs"].mean(dtype=np.float64))
        metrics["ratio_mean:mean"] = float(ratio.mean())
    if loss.metrics is not None:
        metrics |= loss.metrics(learner, inputs, chosen.values)
    return metrics
