"""`tinsmith plan`: estimates whether a model fits on given devices, and how fast it could be there.

It reads the model's config.json alone. The devices need not be in this machine.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from ...engine import device_catalogue, memory, roofline
from ...engine.device_catalogue import GIB, Device
from ...engine.memory import MemoryPlan, Workload
from ...model.folder import Counts, counts
from .command_line import fail

PLAN_HELP = f"""Say whether a model fits on given devices, and the highest speed that it could reach there.

Neither the devices nor the weights have to be here: only config.json is read, and downloaded if the model is
on the hub. Examples:

- Twenty adapters of rank 32 over a model from the hub, rows of up to 32,768 tokens:
  `tinsmith plan --model Qwen/Qwen3-8B --device v5p-8 --seq 32k --rank 32 --tenants 20`

- A folder, training all weights on eight GPUs, with the result as JSON:
  `tinsmith plan --model ./my-model --device h200x8 --train full --json`

- A mesh of your own:
  `tinsmith plan --model Qwen/Qwen3-8B --device h100x8 --mesh data=2,fsdp=4`

Devices: {device_catalogue.known()}.
TPU slices have Google Cloud's names: v5p-8 is four chips, v5e-16 and v6e-16 are sixteen.

Sizes are estimates, within 15 % of what the compilers report. If the device's compiler is installed (the
extra `plan`), the training step is compiled for it, which takes minutes and is more exact. Speeds are upper
bounds from FLOPs and bandwidth (a roofline); real programs are slower. The exit status is 1 if the model does
not fit.
"""

_KINDS = {
    "base": "base model",
    "programs": "largest program",
    "tenants": "models in training",
    "zeros": "gradients under way",
    "sampler_adapters": "samplers' weights",
    "kv_pages": "KV cache",
    "margin": "margin",
}
_SOURCES = {True: "The training step was compiled; other sizes are estimated.", False: "Sizes are estimated."}
_COMPILE_SECONDS = 3600.0
_ITEMSIZE = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Report:
    """The result of `tinsmith plan`: how memory is used, and the speeds that follow from it."""

    model: str
    counts: Counts
    work: Workload
    device: Device
    plan: MemoryPlan
    compiled: bool = False

    @property
    def hint(self) -> str | None:
        """Say how much memory is missing, and what would help; return None if the model fits."""
        if self.plan.fits:
            return None
        larger = roofline.smallest_slice(self.counts, self.work, self.device)
        remedy = "" if larger is None else f"; {larger.name} would do"
        return memory.needs(self.plan) + remedy + memory.less(self.counts, self.work, self.plan)

    def as_json(self) -> dict[str, Any]:
        """The report in bytes, tokens and tokens per second."""
        plan, work = self.plan, self.work
        step = roofline.step_flops(self.counts, work, plan)
        return {
            "model": self.model,
            "parameters": self.counts.parameters,
            "device": self.device.name,
            "devices": self.device.count,
            "machines": self.device.machines,
            "fits": plan.fits,
            "hint": self.hint,
            "source": "compiled" if self.compiled else "estimated",
            "mesh": vars(plan.mesh),
            "capacity_bytes": plan.capacity,
            "needed_bytes": plan.needed,
            "memory_bytes": plan.kinds,
            "remat": plan.remat,
            "micro_batch": {
                "rows_per_device": plan.rows,
                "tokens_per_row": plan.sequence,
                "tokens": plan.micro_batch_tokens,
            },
            "kv_tokens": plan.kv_tokens if plan.fits else 0,
            "slots": plan.slots if plan.fits else 0,
            "useful_share_of_flops": step.useful / step.executed,
            "useful_share_of_products": step.useful_products / step.executed_products,
            "training_tokens_per_second_upper_bound": roofline.training_bound(
                self.counts, work, plan, self.device
            ),
            "decoding_tokens_per_second_upper_bound": roofline.decoding_bound(
                self.counts, work, plan, self.device
            ),
        }

    def as_text(self) -> str:
        """The report as text."""
        plan, work, all_of_it = self.plan, self.work, self.as_json()
        mesh = f" with --mesh {plan.mesh}" if plan.mesh.devices > 1 else ""
        kinds = _KINDS | {
            "tenants": f"{work.tenants} {'model' if work.tenants == 1 else 'models'} in training"
        }
        lines = [
            f"{self.model}: {self.counts.parameters / 1e9:.2f} billion parameters",
            f"{self.device.name}: {self.device.count} x {plan.capacity / GIB:.1f} GiB",
            "",
            f"It fits{mesh}." if plan.fits else f"It does not fit{mesh}: it {self.hint}.",
            "",
            f"{'Memory of each device':24}{'GiB':>8}",
        ]
        shown = (name for name in plan.kinds if plan.fits or name != "kv_pages")
        lines += [f"  {kinds[name]:22}{plan.kinds[name] / GIB:8.1f}" for name in shown]
        if not plan.fits:
            return "\n".join(lines)
        rows = f"{plan.rows} {'row' if plan.rows == 1 else 'rows'} of {plan.sequence:,} tokens"
        lines += [
            "",
            f"Training: micro-batches of {rows} on each device, remat {plan.remat!r};",
            f"  useful FLOPs: {all_of_it['useful_share_of_flops']:.0%} of all, "
            f"{all_of_it['useful_share_of_products']:.0%} in products with weights",
            f"  upper bound: {all_of_it['training_tokens_per_second_upper_bound']:,.0f} tokens/s",
            f"Sampling: KV cache of {plan.kv_tokens:,} tokens, {plan.slots} slots of {plan.sequence:,};",
            f"  upper bound: {all_of_it['decoding_tokens_per_second_upper_bound']:,.0f} tokens/s",
            "",
            f"{_SOURCES[self.compiled]} Speeds are upper bounds from a roofline.",
        ]
        if self.device.machines > 1:
            lines.append(
                f"{self.device.name} is {self.device.machines} machines. So far, one server uses the devices "
                "of one machine."
            )
        return "\n".join(lines)


def report(model: str, of: Counts, work: Workload, device: Device, mesh: memory.Mesh | None = None) -> Report:
    """Plan a workload on a device, on the given mesh or the fastest one that fits."""
    if mesh is None:
        return Report(model, of, work, device, roofline.fastest(of, work, device))
    return Report(model, of, work, device, memory.plan(of, work, device.memory, mesh))


def compiled(estimated: Report, folder: Path) -> Report:
    """Refine a plan: compile its training step, and plan again with the memory that the compiler reports.

    This is repeated until the step of the chosen plan has been compiled.

    Raises ValueError saying why the compiler cannot be used.
    """
    measured: dict[tuple[int, memory.Remat], int] = {}
    made = estimated
    while (key := (made.plan.rows, made.plan.remat)) not in measured:
        step = memory.StepToCompile(str(folder), made.device.name, made.work, made.plan.mesh, *key)
        measured[key] = _compile(step).temporaries
        chosen = memory.plan(made.counts, made.work, made.device.memory, made.plan.mesh, measured)
        made = replace(made, plan=chosen, compiled=True)
    return made


def _compile(step: memory.StepToCompile) -> memory.CompiledStep:
    command = [sys.executable, "-m", "tinsmith.engine.plan"]
    try:
        ran = subprocess.run(
            command, input=msgspec.json.encode(step), capture_output=True, timeout=_COMPILE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"it took longer than {_COMPILE_SECONDS / 60:.0f} minutes") from None
    if ran.returncode != 0:
        lines = ran.stderr.decode(errors="replace").strip().splitlines() or ["no reason was given"]
        raise ValueError(lines[-1][:500])
    return msgspec.json.decode(ran.stdout.splitlines()[-1], type=memory.CompiledStep)


def plan(
    model: Annotated[str, typer.Option(help="A folder with config.json, a hub id, or smollm2-135m.")],
    device: Annotated[
        str, typer.Option(help="The device or slice: h200, h200x8, a100-40, v5e-16, v5p-8, ...")
    ],
    seq: Annotated[
        str | None, typer.Option(help="Longest row in tokens: 8192, 32k [default: 8k, or the model's limit].")
    ] = None,
    train: Annotated[str, typer.Option(help="What is trained: lora or full.")] = "lora",
    rank: Annotated[int, typer.Option(help="LoRA's rank, 1 to 512.")] = 32,
    tenants: Annotated[
        int, typer.Option(help="Models that train at the same time, each with a sampler.")
    ] = 1,
    optimizer: Annotated[str, typer.Option(help=f"{', '.join(memory.OPTIMIZERS)}.")] = "adamw",
    dtype: Annotated[str, typer.Option(help="The base model's dtype: bfloat16 or float32.")] = "bfloat16",
    mesh: Annotated[
        str | None, typer.Option(help="data=2,fsdp=4,tensor=1 [default: the fastest that fits].")
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Do not compile, even if the device's compiler is installed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes and tokens.")] = False,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where downloads are stored [default: ~/.cache/tinsmith].")
    ] = None,
) -> None:
    from ..base_models import config_alone
    from ..settings import default_cache_dir

    try:
        found = device_catalogue.find(device)
    except ValueError as error:
        fail(f"--device: {error}")
    _one_of("--train", train, ("lora", "full"))
    _one_of("--optimizer", optimizer, memory.OPTIMIZERS)
    _one_of("--dtype", dtype, tuple(_ITEMSIZE))
    if not 1 <= rank <= 512:
        fail(f"--rank: {rank} is not between 1 and 512")
    if not 1 <= tenants <= 100_000:
        fail(f"--tenants: {tenants} is not between 1 and 100,000")
    axes = None if mesh is None else _mesh(mesh, found)
    length = None if seq is None else _tokens(seq)
    try:
        name, folder, config = config_alone(model, cache_dir or default_cache_dir())
    except (ValueError, OSError, RuntimeError) as error:
        fail(str(error))
    limit = config.max_sequence_length
    if length is not None and length > limit:
        fail(f"--seq: {seq} is longer than {name}'s limit of {limit:,} tokens")
    work = Workload(length or min(8192, limit), tenants, rank, train == "full", optimizer, _ITEMSIZE[dtype])
    made = report(name, counts(config), work, found, axes)
    if not estimate and found.has_compiler:
        typer.echo(f"compiling a training step for {found.name}; --estimate skips that", err=True)
        try:
            made = compiled(made, folder)
        except ValueError as error:
            typer.echo(f"it cannot be compiled, so its memory is estimated: {error}", err=True)
    typer.echo(json.dumps(made.as_json(), indent=2) if as_json else made.as_text())
    if not made.plan.fits:
        raise typer.Exit(1)


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        fail(f"{option}: {value!r} is not one of {', '.join(allowed)}")


def _tokens(text: str) -> int:
    """Parse 8192, 32k (32,768) or 1m."""
    found = re.fullmatch(r"(\d{1,9})([km]?)", text.strip().lower().replace(",", "").replace("_", ""))
    tokens = int(found[1]) * {"": 1, "k": 1024, "m": 1024**2}[found[2]] if found else 0
    if tokens < 2:
        fail(f"--seq: {text!r} is not a number of tokens; write 8192 or 32k")
    return tokens


def _mesh(text: str, device: Device) -> memory.Mesh:
    from ..settings import read_mesh

    try:
        axes = read_mesh(text)
    except ValueError as error:
        fail(f"--mesh: {error}")
    if prod(axes.values()) != device.count:
        fail(f"--mesh: {text} is of {prod(axes.values())} devices, and {device.name} has {device.count}")
    return memory.Mesh.of(axes)
