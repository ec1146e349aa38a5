"""Compile training and sampling at real shapes for accelerators that are not here, and write the table of
docs/accelerators.md.

    write_page.py [TARGET ...]      by default all of MEASURES

Figures of targets that are not named stay as they were: they are in docs/accelerators.json. Every target is
compiled in a process of its own, one after the other. It runs in the environment of requirements.txt
(`make accelerators`).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tinsmith.engine.device_catalogue import find

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
FIGURES = DOCS / "accelerators.json"
GIB = 2**30

MEASURES: dict[str, dict[str, float | None]] = {
    "h200": {
        "step:model=8b,length=8192": 21,
        "step:model=8b,length=32768": 32,
        "step:model=8b,length=131072": 76,
        "step:model=8b,length=8192,remat=attention": None,
        "step:model=8b,length=8192,remat=dots": None,
        "attention:length=32768": None,
        "decode:model=8b,context=12288": 126.3,
        "decode:model=8b,context=2048,slots=256,adapters=4": None,
        "prefill:model=8b,tokens=4096,context=12288,sequences=16": None,
    },
    "h200x8": {
        "step:model=70b,length=8192,fsdp=8,rows=8": 41,
        "step:model=30b-a3b,expert=8,rows=8,length=8192": 19,
        "step:model=30b-a3b,fsdp=8,rows=8,length=8192": None,
        "decode:model=70b,context=12288,fsdp=8": None,
    },
    "v5p-8": {
        "step:model=8b,length=8192,fsdp=4,rows=4": None,
        "step:model=8b,length=8192,tensor=4": None,
        "step:model=30b-a3b,expert=4,rows=4,length=8192": 24,
    },
    "v5p-16": {"step:model=70b,length=8192,fsdp=8,rows=8": 37},
    "v6e-8": {"step:model=8b,length=8192,fsdp=8,rows=8": 8},
    "v5e-16": {"step:model=8b,length=8192,fsdp=16,rows=16": 7},
}
"""By target and case: the most GiB that each device may need in all, where there is such a bound."""

# Elements of all layers' matrices, of the head, and of an adapter of rank 1 on all of these.
_PARAMETERS = {"8b": (6.946e9, 0.622e9, 2.88e6), "70b": (68.45e9, 1.051e9, 13.08e6)}

_PLACE = re.compile(r"(<!-- measures -->\n).*(<!-- /measures -->\n)", re.DOTALL)


def main(*targets: str) -> None:
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for target in targets or MEASURES:
        command = [sys.executable, HERE / "laboratory.py"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as ran:
            assert ran.stdin
            assert ran.stdout
            with ran.stdin:
                ran.stdin.writelines(f"{target} {case}\n" for case in MEASURES[target])
            for line in ran.stdout:
                if not line.startswith("{"):
                    continue
                found = json.loads(line)
                said = found.get("error") or f"{found['total'] / GIB:.1f} GiB"
                print(target, found["case"], said, flush=True)
                if "error" not in found:
                    figures.setdefault(target, {})[found["case"]] = _kept(found)
                    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    page = DOCS / "accelerators.md"
    page.write_text(_PLACE.sub(lambda found: found[1] + _table(figures) + found[2], page.read_text()))


def _kept(found: dict[str, Any]) -> dict[str, Any]:
    names = ("arguments", "temporaries", "total", "calls", "products", "cpu_seconds")
    gathers = sum(n for kind, _, n in found["collectives"] if kind == "all-gather")
    return {name: found[name] for name in names} | {"gathers": gathers}


def _table(figures: dict[str, Any]) -> str:
    lines = [
        "| devices | program | arguments | temporaries | total | bound | useful | CPU-seconds to compile |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for target, cases in MEASURES.items():
        for case, bound in cases.items():
            found = figures.get(target, {}).get(case)
            if found is None:
                continue
            sizes = (f"{found[name] / GIB:.1f}" for name in ("arguments", "temporaries", "total"))
            cells = (
                _device_name(target),
                case.replace("step:", "").replace("attention:", "one layer's attention, ").replace(",", ", "),
                *sizes,
                "" if bound is None else f"≤ {bound:g}",
                _useful(target, case, found),
                f"{found['cpu_seconds']:.0f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _device_name(target: str) -> str:
    device = find(target)
    return target if device.count == 1 else f"{target} ({device.count})"


def _useful(target: str, case: str, found: dict[str, Any]) -> str:
    """The useful share of products on GPUs. Of a TPU's products, some cannot be read from its program."""
    options = dict(option.split("=") for option in case.partition(":")[2].split(","))
    if options.get("model") not in _PARAMETERS or find(target).platform != "gpu" or case[:4] != "step":
        return ""  # products of experts are in kernels that do not show in the program
    matrices, head, adapter = _PARAMETERS[options["model"]]
    devices = int(options.get("fsdp", 1)) * int(options.get("tensor", 1))
    tokens = int(options["length"]) * int(options.get("rows", 1)) / devices
    needed = tokens * (4 * (matrices + head) + 6 * 32 * adapter)
    return f"{needed / sum(found['products'].values()):.1%}"


if __name__ == "__main__":
    main(*sys.argv[1:])
