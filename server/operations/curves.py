"""Curves of training metrics, from the rows that the ledger keeps of each answer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from sqlalchemy import Row


@dataclass
class Point:
    """One step of a run. `complete`: its optim_step has been answered."""

    step: int
    time: float = 0.0
    complete: bool = True
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """Points of a run, and the `cursor` from which the next look goes on: it leaves out complete points."""

    points: list[Point]
    cursor: str


def parse_cursor(cursor: str) -> tuple[int, float]:
    """Return the number of the last operation and the time of the last report seen. Raises ValueError."""
    seen, _, reported = cursor.partition("-")
    number, reported_at = int(seen), float(reported or 0)
    if not (0 <= number < 1 << 63 and math.isfinite(reported_at)):
        raise ValueError
    return number, reported_at


def curve(found: Iterable[Row], cursor: tuple[int, float]) -> Curve:
    """Put the rows of each step together.

    Forward and backward passes belong to the optim_step after them. Of the metrics of several passes, `:sum`
    are added, `:min` and `:max` compared, `:mean` averaged over tokens. `loss_per_token`, `kl_per_token` and
    `tokens_per_second` (of the time on the device) are derived. Names of passes without a gradient begin with
    `forward/`.
    """
    points: list[Point] = []
    passes: list[Row] = []
    reports: dict[int, Point] = {}
    number, reported_at = cursor
    for row in found:
        if row.kind == "reported":
            point = reports.setdefault(row.step, Point(row.step))
            point.time, point.metrics = row.at, point.metrics | row.metrics
            reported_at = max(reported_at, row.at)
        elif row.kind == "optim_step":
            points.append(_step(row, passes))
            number, passes = max(number, row.number), []
        else:
            passes.append(row)
    if passes:
        following = points[-1].step + 1 if points else 1
        points.append(Point(following, passes[-1].at, False, _merged(passes)))
    by_step = {point.step: point for point in points}
    for step, report in reports.items():
        if step in by_step:
            by_step[step].metrics |= report.metrics
        else:
            points.append(report)
    return Curve(points, f"{number}-{reported_at!r}")


def _step(row: Row, passes: list[Row]) -> Point:
    metrics = _merged([*passes, row])
    metrics.pop("optimizer_step", None)
    return Point(row.step or 0, row.at, True, metrics)


def _merged(found: list[Row]) -> dict[str, float]:
    merged: dict[str, float] = {}
    gradient = [row for row in found if row.kind != "forward"]
    for prefix, some in (("", gradient), ("forward/", [row for row in found if row.kind == "forward"])):
        merged |= {prefix + name: value for name, value in _reduced(some).items()}
    return merged


def _reduced(found: list[Row]) -> dict[str, float]:
    values: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in found:
        weight = row.metrics.get("valid_tokens:sum", 1.0) or 1.0
        for name, value in row.metrics.items():
            values[name].append((value, weight))
    reduced = {name: _of_passes(name.rpartition(":")[2], each) for name, each in values.items()}
    return {name: value for name, value in _derived(reduced).items() if math.isfinite(value)}


def _of_passes(reduction: str, values: list[tuple[float, float]]) -> float:
    numbers = [value for value, _ in values]
    match reduction:
        case "sum":
            return sum(numbers)
        case "min":
            return min(numbers)
        case "max":
            return max(numbers)
        case "mean":
            return sum(value * weight for value, weight in values) / sum(weight for _, weight in values)
    return numbers[-1]


def _derived(metrics: dict[str, float]) -> dict[str, float]:
    derived: dict[str, float] = {}
    if valid := metrics.get("valid_tokens:sum"):
        if "loss:sum" in metrics:
            derived["loss_per_token"] = metrics["loss:sum"] / valid
        if "kl_sampled:sum" in metrics:
            derived["kl_per_token"] = metrics["kl_sampled:sum"] / valid
    seconds, tokens = metrics.get("device_seconds:sum"), metrics.get("tokens:sum")
    if seconds and tokens:
        derived["tokens_per_second"] = tokens / seconds
    return metrics | derived
