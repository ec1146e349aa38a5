"""`tinsmith doctor`: whether `tinsmith serve` would work with these settings, and what to do if not."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..settings import Settings
from .command_line import read_settings, require_writable, takes_settings

DOCTOR_HELP = """Check what `tinsmith serve` needs, and say what to do if something is wrong.

It looks at Python and the packages, the devices, the data directory and its ledger, the port, the disk, the
models and the SGLang servers. It takes the options of `serve`, and starts and changes nothing.

Example: `tinsmith doctor --model Qwen/Qwen3-8B --mesh fsdp=2`

The exit status is 1 if something is wrong.
"""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "fastapi", "uvicorn")
_FREE_BYTES = 10 << 30  # with less, checkpoints soon fill the disk
_DEVICES = """
import json, jax
found = jax.devices()
stats = found[0].memory_stats() or {}
one = found[0]
print(json.dumps([jax.__version__, one.platform, one.device_kind, len(found), stats.get("bytes_limit")]))
"""
_DEVICE_SECONDS, _ENDPOINT_SECONDS = 120.0, 5.0


@dataclass(frozen=True)
class Finding:
    """`advice` says what to do about a warning or a problem."""

    what: str
    state: Literal["ok", "warning", "problem"]
    text: str
    advice: str = ""


AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red")}


@takes_settings(Settings, json=(AsJson, False))
def doctor(config: Path | None = None, json: bool = False, **given: Any) -> None:
    settings = read_settings(Settings, given, config)
    found = []
    for check in _CHECKS:
        for finding in check(settings):
            found.append(finding)
            if not json:
                mark, color = _MARKS[finding.state]
                typer.echo(f"{typer.style(mark, fg=color)} {finding.what}: {finding.text}")
                if finding.advice:
                    typer.echo(f"    {finding.advice}")
    if json:
        typer.echo(_json(found))
    if any(each.state == "problem" for each in found):
        raise typer.Exit(1)


def _json(found: list[Finding]) -> str:
    return json.dumps([asdict(each) for each in found])


def _software(_settings: Settings) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok", f"{version} at {sys.executable}")
    there, missing = [], []
    for name in _PACKAGES:
        try:
            there.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield Finding("packages", "ok", ", ".join(there))
    if missing:
        yield Finding(
            "packages", "problem", f"missing: {', '.join(missing)}", "install Tinsmith again, with pip"
        )


def _devices(settings: Settings) -> Iterator[Finding]:
    """Asks JAX in a process of its own, as the engine would."""
    command = [sys.executable, "-c", _DEVICES]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_DEVICE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        text = f"JAX does not find its devices within {_DEVICE_SECONDS:.0f} s"
        yield Finding("devices", "problem", text, "another process may hold them; on a TPU VM only one can")
        return
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding(
            "devices", "problem", last, "does the jaxlib fit the driver? `pip install 'tinsmith[cuda12]'`"
        )
        return
    version, platform, kind, count, limit = json.loads(ended.stdout.splitlines()[-1])
    memory = f", {limit / 1e9:.1f} GB each" if limit else ""
    yield Finding("devices", "ok", f"JAX {version} finds {count} x {kind} ({platform}){memory}")
    if platform == "cpu" and (shutil.which("nvidia-smi") or Path("/dev/accel0").exists()):
        yield Finding(
            "devices",
            "warning",
            "this machine has an accelerator, and JAX uses the CPU",
            "install the extra for it: `pip install 'tinsmith[cuda12]'`, `[cuda13]` or `[tpu]`",
        )
    wanted = 1
    for size in settings.mesh.values():
        wanted *= size
    if wanted > count:
        yield Finding(
            "devices", "problem", f"--mesh is of {wanted} devices, and there are {count}", "a smaller mesh"
        )


def _data(settings: Settings) -> Iterator[Finding]:
    from ..ledger.ledger import check
    from ..ledger.ownership import claim, sqlite_file

    advice = "choose another folder, or give this user the right to write there"
    for folder, option in ((settings.data_dir, "--data-dir"), (settings.cache_dir, "--cache-dir")):
        try:
            require_writable(folder, option)
        except ValueError as error:
            yield Finding("folders", "problem", str(error), advice)
        else:
            yield Finding("folders", "ok", f"{folder.expanduser().absolute()} can be written to")
    try:
        check(settings.ledger_url)
        if (file := sqlite_file(settings.ledger_url)) is not None and not file.is_file():
            yield Finding("ledger", "ok", f"{file} will be made")
            return
        owner = claim(settings.data_dir, settings.ledger_url) if settings.data_dir.is_dir() else None
    except (ValueError, OSError) as error:
        yield Finding("ledger", "problem", str(error), "stop that server, or choose another --data-dir")
        return
    if owner is not None:
        owner.release()
    yield Finding("ledger", "ok", "it can be read, and no server owns it")


def _disk(settings: Settings) -> Iterator[Finding]:
    folder = settings.data_dir.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free at {folder}"
    if free < settings.disk_reserve_bytes:
        yield Finding("disk", "problem", text, "submits would be refused with 507: make room")
    elif free < _FREE_BYTES:
        yield Finding("disk", "warning", text, "checkpoints may soon fill it")
    else:
        yield Finding("disk", "ok", text)


def _port(settings: Settings) -> Iterator[Finding]:
    from .serve import listen

    try:
        listen(settings.host, settings.port).close()
    except ValueError as error:
        yield Finding("port", "problem", str(error))
    else:
        yield Finding("port", "ok", f"{settings.host}, port {settings.port}, is free")


def _models(settings: Settings) -> Iterator[Finding]:
    from ..base_models import plan

    if not settings.model:
        yield Finding("model", "warning", "none was given", "give one, such as --model smollm2-135m")
    for entry in settings.model:
        try:
            planned = plan(
                [entry],
                settings.dtype,
                settings.mesh,
                settings.max_sequence_length,
                settings.kv_cache_tokens,
            )
        except (ValueError, OSError, RuntimeError) as error:
            yield Finding("model", "problem", str(error))
            continue
        for each in planned:
            where = each.folder or each.hub_id or "the package index"
            size = f", {each.parameters / 1e9:.2f} billion parameters" if each.parameters else ""
            yield Finding("model", "ok", f"{each.name}: {where}{size}")


def _sglang(settings: Settings) -> Iterator[Finding]:
    import httpx

    secret = settings.sglang_api_key
    headers = {} if secret is None else {"Authorization": f"Bearer {secret.get_secret_value()}"}
    for url in settings.sglang_urls:
        try:
            answer = httpx.get(f"{url}/get_model_info", headers=headers, timeout=_ENDPOINT_SECONDS)
            answer.raise_for_status()
            served = answer.json().get("model_path", "a model")
        except (httpx.HTTPError, ValueError, AttributeError) as error:
            advice = "is it started, and is the address right? Until it answers, the engine draws the samples"
            yield Finding("sglang", "warning", f"{url}: {error}", advice)
        else:
            yield Finding("sglang", "ok", f"{url} serves {served}")


_CHECKS: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
    _software,
    _devices,
    _data,
    _disk,
    _port,
    _models,
    _sglang,
)
