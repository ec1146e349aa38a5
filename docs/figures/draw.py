"""Draws the documentation's plots from their data: `python docs/figures/draw.py [FOLDER]`.

The data are beside it (`speed.json` from docs/performance.md, `recovery.json` of bench/recovery.py,
`tenants.json` of bench/tenants.py) and in docs/accelerators.json. Each plot becomes an SVG file, here or in
the folder that is given. The drawing of the architecture is made here too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).resolve().parent
COLOURS = ("#b4572a", "#46627f", "#9aa5b1")
mpl.rcParams |= {
    "svg.hashsalt": "tinsmith",  # the same file each time
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "figure.facecolor": "white",
}


def data(name: str) -> dict[str, Any]:
    return json.loads((HERE / name).read_text())


def axes(title: str, x: str, y: str) -> Axes:
    _, made = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    made.set(xlabel=x, ylabel=y)
    made.set_title(title, loc="left", fontsize=11)
    return made


def save(folder: Path, name: str) -> None:
    plt.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close()


def bars(folder: Path, name: str, title: str) -> None:
    """Groups of bars: one group per dtype or number of requests, one bar per side."""
    measured = data("speed.json")[name]
    groups = {group: sides for group, sides in measured.items() if isinstance(sides, dict)}
    made = axes(title, "", measured["unit"])
    for number, side in enumerate(next(iter(groups.values()))):
        places = [at + 0.27 * (number - 1) for at in range(len(groups))]
        values = [sides[side] for sides in groups.values()]
        made.bar_label(made.bar(places, values, 0.25, label=side), fmt="%g", fontsize=9)
    made.set_xticks(range(len(groups)), list(groups))
    made.margins(y=0.4)
    made.legend(frameon=False, fontsize=9, loc="upper left")
    save(folder, name)


def memory(folder: Path) -> None:
    """Plot the memory of a LoRA step of an 8B model on one H200, by the length of a row."""
    found = data("../accelerators.json")["h200"]
    lengths = (8192, 32768, 131072)
    made = axes("LoRA step of an 8B model on one H200", "tokens in a row", "GiB")
    bottom = [0.0] * len(lengths)
    places = range(len(lengths))
    for kind, label in (("arguments", "weights and optimizer"), ("temporaries", "activations")):
        values = [found[f"step:model=8b,length={length}"][kind] / 2**30 for length in lengths]
        made.bar(places, values, 0.5, bottom, label=label)
        bottom = [below + value for below, value in zip(bottom, values, strict=True)]
    for place, total in zip(places, bottom, strict=True):
        made.annotate(f"{total:.1f}", (place, total), ha="center", va="bottom", fontsize=9)
    made.axhline(141e9 / 2**30, color="black", linewidth=0.8, linestyle=":")
    made.annotate("the device has 131", (0, 141e9 / 2**30), va="bottom", ha="center", fontsize=9)
    made.set_xticks(places, [f"{length:,}" for length in lengths])
    made.legend(frameon=False, fontsize=9, loc="center left")
    save(folder, "memory")


def recovery(folder: Path) -> None:
    """Steps over time of one run that is left alone and one whose processes are killed."""
    measured = data("recovery.json")
    made = axes("The same run, left alone and with SIGKILL", "seconds", "steps done")
    for name, label in (("undisturbed", "left alone"), ("killed", "killed")):
        seconds = measured[name]["seconds"]
        made.plot(seconds, range(1, len(seconds) + 1), label=label)
    killed = measured["killed"]
    for kind, at, _held in killed["kills"]:
        done = sum(each <= at for each in killed["seconds"])
        made.plot(at, done, "x" if kind == "engine" else "s", color="black", markersize=6)
    made.plot([], [], "x", color="black", label="engine killed")
    made.plot([], [], "s", color="black", label="server killed")
    made.legend(frameon=False, fontsize=9)
    save(folder, "recovery")


def tenants(folder: Path) -> None:
    """Tokens per second of all tenants together, by their number."""
    measured = data("tenants.json")
    rows = measured["rows"]
    made = axes("Tenants that train small batches on one device", "tenants", "tokens/s, all together")
    made.plot([row["tenants"] for row in rows], [row["tokens_per_second"] for row in rows], "o-")
    made.set_xticks([row["tenants"] for row in rows])
    made.set_ylim(bottom=0)
    save(folder, "tenants")


def architecture(folder: Path) -> None:
    """The two processes, their parts, and what they exchange."""
    _, made = plt.subplots(figsize=(9.2, 5.2), layout="constrained")
    made.set(xlim=(-0.5, 92.5), ylim=(-0.5, 50.5))
    made.axis("off")

    def box(x: float, y: float, width: float, height: float, text: str, outer: bool = False) -> None:
        """A box with its text in the middle; an outer one has it as a title above its contents."""
        kind = {"facecolor": "#f4f1ee", "edgecolor": COLOURS[0]} if outer else {"facecolor": "white"}
        made.add_patch(
            plt.Rectangle((x, y), width, height, linewidth=1, **({"edgecolor": COLOURS[1]} | kind))
        )
        place = (x + 1, y + height - 1) if outer else (x + width / 2, y + height / 2)
        made.text(
            *place,
            text,
            fontsize=9,
            weight="bold" if outer else "normal",
            ha="left" if outer else "center",
            va="top" if outer else "center",
        )

    def arrow(start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
        style = {"arrowstyle": "<|-|>", "color": "#333333", "shrinkA": 0, "shrinkB": 0, "linewidth": 1}
        made.annotate("", end, start, arrowprops=style)
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        made.text(*middle, text, fontsize=8, ha="center", va="bottom", color="#333333")

    box(0, 34, 14, 10, "clients:\nTinker SDK, xorl,\nOpenAI, browsers")
    box(22, 0, 34, 50, "server process (no JAX)", outer=True)
    box(24, 37, 30, 8, "http, wire\nroutes, bodies and answers, keys")
    box(24, 26, 18, 8, "models\nsessions, runs, samplers")
    box(44, 26, 10, 8, "plugins\nSGLang, RLVE")
    box(24, 14, 18, 9, "operations\ndispatcher: order\nof seq_id")
    box(44, 14, 10, 9, "supervision\noutbox,\nrestarts")
    box(24, 3, 30, 7, "ledger\nSQLite or PostgreSQL")
    box(66, 6, 26, 44, "engine process (owns the devices)", outer=True)
    box(68, 37, 22, 7, "loop, scheduler\nturns of models and samples")
    box(68, 26, 10, 8, "training\npacking,\ngradients")
    box(80, 26, 10, 8, "sampling\nprefill,\ndecode")
    box(68, 16, 22, 7, "model, losses\ncompiled JAX programs")
    box(68, 8, 22, 5, "CPU, GPUs or TPUs")
    box(0, 14, 14, 8, "SGLang servers\n(optional)")
    box(66, 0, 26, 4, "data directory: checkpoints")
    arrow((14, 41), (24, 41), "HTTP")
    arrow((33, 37), (33, 34))
    arrow((42, 30), (44, 30))
    arrow((33, 26), (33, 23))
    arrow((42, 18.5), (44, 18.5))
    arrow((33, 14), (33, 10))
    arrow((54, 18.5), (68, 39), "")
    made.text(60.5, 37, "ZeroMQ,\nengine/\nmessages.py", fontsize=8, ha="center", color="#333333")
    arrow((14, 18), (22, 18), "HTTP")
    arrow((73, 37), (73, 34))
    arrow((85, 37), (85, 34))
    arrow((73, 26), (73, 23))
    arrow((85, 26), (85, 23))
    arrow((79, 16), (79, 13))
    arrow((56, 2), (66, 2))
    arrow((79, 6), (79, 4))
    save(folder, "architecture")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    bars(folder, "training", "LoRA training beside transformers + PEFT")
    bars(folder, "decoding", "Decoding with an adapter beside transformers")
    memory(folder)
    recovery(folder)
    tenants(folder)
    architecture(folder)


if __name__ == "__main__":
    main()
