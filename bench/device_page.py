"""Writes the page of bench/device.py: tables in Markdown, and two plots in SVG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

GIB = 2**30


class Line(NamedTuple):
    """One line of a plot. What is a limit rather than a measurement is dashed."""

    name: str
    points: list[tuple[float, float]]
    dashed: bool = False


def slug(device: str) -> str:
    """Return a device's name for files, as `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_page(results: dict[str, Any], folder: Path) -> Path:
    """Write the page and its plots; return the page's path."""
    about = next(case for case in results["cases"] if "device" in case)
    name = slug(about["device"])
    cases = {
        kind: [case for case in results["cases"] if case["case"] == kind]
        for kind in ("start", "decode", "train")
    }
    plots = {
        "decoding": ("sequences at once", "tokens/s", _decoding_lines(cases["decode"])),
        "training": ("tokens of a row", "tokens/s", _training_lines(cases["train"])),
    }
    parts = [
        f"# {about['device']}",
        f"Measured by `bench/device.py` (`make gpu`) on one {about['device']}, with JAX {about['jax']} and "
        f"random weights in {about['dtype']}. All adapters have rank 32, on all matrices and the head.",
        "## Tests",
        _tests(results["tests"]),
        "## Training",
        "Forward and backward of whole rows, the fastest of three after the first. MFU is the share of the "
        "device's peak that the FLOPs of a step without recomputation make up; the bound is the roofline of "
        "`tinsmith plan`.",
        _training_table(cases["train"]),
    ]
    parts += _plot(folder, name, "training", plots)
    parts += [
        "## Decoding",
        "With an unmerged adapter. The limit is the memory's bandwidth (the vendor's figure where there is "
        "one, that of a copy otherwise): each token reads all weights once, and every sequence's keys and "
        "values.",
        _decoding_table(cases["decode"]),
    ]
    parts += _plot(folder, name, "decoding", plots)
    parts += [
        "## Start",
        "From the start of the process until the weights are on the device, and until the first training "
        "step is done.",
        _start_table(cases["start"]),
    ]
    path = folder / f"{name}.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    return path


def _tests(tests: list[dict]) -> str:
    if not tests:
        return "No tests were run."
    counts = {
        outcome: sum(test["outcome"] == outcome for test in tests)
        for outcome in ("passed", "failed", "skipped")
    }
    rows = [
        (
            f"`{test['name']}`",
            test["outcome"],
            ", ".join(f"{name} {value}" for name, value in test["measured"].items()),
            f"{test['seconds']:.1f}",
        )
        for test in tests
    ]
    said = ", ".join(f"{number} {outcome}" for outcome, number in counts.items() if number)
    return f"{said}.\n\n" + table(("test", "outcome", "measured", "seconds"), rows)


def _training_table(cases: list[dict]) -> str:
    rows = []
    for case in cases:
        what = (case["shape"], f"{case['rows']} x {case['length']:,}")
        if "error" in case:
            rows.append((*what, case["error"], "", "", "", "", ""))
            continue
        bound = case.get("bound")
        rows.append(
            (
                *what,
                f"{case['tokens_per_second']:,.0f}",
                "" if bound is None else f"{bound:,.0f} ({case['tokens_per_second'] / bound:.0%})",
                "" if "mfu" not in case else f"{case['mfu']:.1%}",
                f"{case['peak_bytes'] / GIB:.1f}",
                case["remat"],
                f"{1000 * case['optimizer_seconds']:.0f}",
            )
        )
    header = ("model", "rows", "tokens/s", "bound", "MFU", "peak GiB", "remat", "AdamW step, ms")
    return table(header, rows)


def _decoding_table(cases: list[dict]) -> str:
    rows = []
    for case in cases:
        what = (case["shape"], case["batch"], f"{case['prompt']} + {case['new_tokens']}")
        if "error" in case:
            rows.append((*what, case["error"], "", "", "", ""))
            continue
        speed, limit = case["tokens_per_second"], case["limit"]
        rows.append(
            (
                *what,
                f"{speed:,.0f}",
                f"{limit:,.0f}",
                f"{speed / limit:.0%}",
                f"{case['prefill_tokens_per_second']:,.0f}",
                f"{case['peak_bytes'] / GIB:.1f}",
            )
        )
    header = ("model", "sequences", "tokens", "tokens/s", "limit", "of it", "prompts' tokens/s", "peak GiB")
    return table(header, rows)


def _start_table(cases: list[dict]) -> str:
    rows = []
    for case in cases:
        seconds = (
            (case["error"], "")
            if "error" in case
            else (f"{case['ready_seconds']:.1f}", f"{case['first_step_seconds']:.1f}")
        )
        rows.append((case["shape"], case["state"], *seconds))
    return table(("model", "compilation cache", "weights there, s", "first step done, s"), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def _decoding_lines(cases: list[dict]) -> list[Line]:
    lines = []
    for shape in dict.fromkeys(case["shape"] for case in cases):
        of = [case for case in cases if case["shape"] == shape and "error" not in case]
        lines.append(Line(shape, [(case["batch"], case["tokens_per_second"]) for case in of]))
        lines.append(Line(f"{shape}, limit", [(case["batch"], case["limit"]) for case in of], dashed=True))
    return lines


def _training_lines(cases: list[dict]) -> list[Line]:
    lines = []
    for shape in dict.fromkeys(case["shape"] for case in cases):
        of = [case for case in cases if case["shape"] == shape and "error" not in case]
        lines.append(Line(shape, [(case["length"], case["tokens_per_second"]) for case in of]))
        bounds = [(case["length"], case["bound"]) for case in of if "bound" in case]
        lines.append(Line(f"{shape}, bound", bounds, dashed=True))
    return lines


def _plot(folder: Path, name: str, kind: str, plots: dict[str, tuple[str, str, list[Line]]]) -> list[str]:
    across, up, lines = plots[kind]
    if not any(line.points for line in lines):
        return []
    file = f"{name}-{kind}.svg"
    _draw(folder / file, across, up, lines)
    return [f"![{kind}: {up} by {across}]({file})"]


def _draw(path: Path, across: str, up: str, lines: Sequence[Line]) -> None:
    """Draw lines over two logarithmic axes into an SVG file."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for index, line in enumerate(lines):
        if not line.points:
            continue
        style = "--" if line.dashed else "o-"
        axes.loglog(*zip(*sorted(line.points), strict=True), style, label=line.name, color=f"C{index // 2}")
    ticks = sorted({x for line in lines for x, _ in line.points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=across, ylabel=up)
    axes.legend(frameon=False, fontsize=9)
    plt.savefig(path, metadata={"Date": None})
    plt.close()
