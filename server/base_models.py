"""Base models of a server: their names and folders, what their config.json tells clients, and whether they
fit.

`plan` finds out, before any weights are downloaded or anything is written, whether all models can be served;
`Plan.obtain` then downloads what is missing.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from ..ckpt import smollm2
from ..ckpt.package_index import Progress
from ..engine import host_memory, memory, messages
from ..engine.device_catalogue import GPU_SHARE
from ..engine.messages import Devices
from ..model import folder as folders
from ..model.folder import ModelConfig, counts
from .errors import BadRequest
from .files import Entry

T = TypeVar("T")
log = logging.getLogger("tinsmith.server")
SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_BESIDE_WEIGHTS = ["*.json", "*.txt", "*.jinja", "*.model"]
_WEIGHTS_THAT_ARE_NOT_READ = (".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".safetensors")


@dataclass(frozen=True)
class BaseModel:
    name: str  # the clients' name for it
    folder: Path
    hub_id: str | None  # if it came from the Hugging Face hub
    max_sequence_length: int
    vocab_size: int
    digest: str | None = None  # of its weights and arithmetic: what was trained on it fits no other
    tokenizer_id: str | None = None  # where clients on other machines find its tokenizer, if known

    def message(self, on_this_machine: bool) -> messages.BaseModel:
        """Return the message for the engine.

        Clients on this machine can load the base model from its folder; others are not told a path of ours.
        """
        reference = str(self.folder) if on_this_machine else self.name
        if self.hub_id is not None:
            # The hub's cache keeps each commit in a folder of its name.
            commit = f"@{self.folder.name}" if self.folder.parent.name == "snapshots" else ""
            reference = self.hub_id + commit
        return messages.BaseModel(self.name, str(self.folder), self.digest, reference)

    @property
    def is_tied(self) -> bool:
        """True if the embedding is the unembedding too: the files have no separate one."""
        try:
            return bool(self.tensors) and self.head_name not in self.tensors
        except (OSError, ValueError):
            return False

    @cached_property
    def config(self) -> ModelConfig:
        """The description of the model. Read at the first use. Raises OSError and ValueError."""
        return folders.read_config(self.folder)

    @property
    def head_name(self) -> str:
        """The name of the unembedding in the weight files. Raises OSError and ValueError."""
        return folders.head_name(self.config)

    @cached_property
    def adapter_modules(self) -> dict[str, frozenset[str]]:
        """The names of the modules that adapters may have, by part of the model. Read at the first use."""
        try:
            return folders.adapter_modules(self.config)
        except (OSError, ValueError):
            return {}

    @cached_property
    def merged_modules(self) -> frozenset[frozenset[str]]:
        """The groups of modules that SGLang reads as one matrix. Raises OSError and ValueError."""
        return folders.merged_modules(self.config)

    @cached_property
    def tensors(self) -> dict[str, Entry]:
        """The tensors of the weight files. Read at the first use. Raises OSError and ValueError."""
        stored = folders.headers(self.folder)
        return {name: Entry(each.dtype, each.shape) for name, each in stored.items()}


class MadeOn(Protocol):
    """Anything that was made on a base model: a model in training, a sampler or a checkpoint."""

    @property
    def base_model(self) -> str: ...

    @property
    def base_digest(self) -> str | None: ...


class BaseModels(dict[str, BaseModel]):
    """The base models that are served, by name."""

    def named(self, name: str) -> BaseModel:
        """Return the base model of this name. Raises BadRequest naming those that are served."""
        try:
            return self[name]
        except KeyError:
            known = ", ".join(sorted(self)) or "none"
            raise BadRequest(f"base_model: unknown model {name!r}; this server has: {known}") from None

    def changed(self, made: MadeOn) -> str | None:
        """Say why something cannot be used now: its base model is not served, or has other weights."""
        now = self.get(made.base_model)
        if now is None:
            served = ", ".join(sorted(self))
            return (
                f"base model {made.base_model!r} is not served now; this server has: {served}"
                if self
                else None
            )
        if None in (now.digest, made.base_digest) or now.digest == made.base_digest:
            return None
        return (
            f"it was made on other weights than those that base model {made.base_model!r} has now: serve "
            "those again, under this name, to use it"
        )


@dataclass(frozen=True)
class Plan:
    """One model to serve. It has a `folder`, or a `hub_id` with its `commit` and weight files, or neither:
    then `ckpt.smollm2` makes it."""

    name: str
    folder: Path | None = None
    hub_id: str | None = None
    commit: str | None = None
    weight_files: tuple[str, ...] = ()
    config: ModelConfig | None = None

    @property
    def parameters(self) -> int:
        """The number of parameters; 0 if no config was read."""
        return 0 if self.config is None else folders.parameter_count(self.config)

    def obtain(self, cache_dir: Path, limit: int | None, progress: Progress | None = None) -> BaseModel:
        """Download what is missing, and check the weights. `limit` caps the sequence length. Without
        `progress`, downloads are reported in the log.

        Raises ValueError, OSError and RuntimeError saying what is wrong.
        """
        progress = progress or Progress(log.info)
        if self.folder is not None:
            folder = self.folder
        elif self.hub_id is not None:
            progress.say(f"Fetching what is missing of {self.hub_id} from the Hugging Face hub …")
            folder = _download(self.hub_id, self.commit, self.weight_files)
        else:
            folder = smollm2.obtain(cache_dir, progress)
            return _described(self.name, folder, None, SMOLLM2_HUB_ID, limit)
        return _described(self.name, folder, self.hub_id, _tokenizer_id(self, folder), limit)


def plan(
    entries: Sequence[str],
    dtype: str = "auto",
    mesh: dict[str, int] | None = None,
    max_sequence_length: int | None = None,
    kv_cache_tokens: int | None = None,
) -> list[Plan]:
    """Read the operator's `--model` options, and check all that can be known before weights are downloaded.

    An entry is `PATH`, `HUB_ID`, `HUB_ID@REVISION`, `smollm2-135m`, or `NAME=` and one of them. For models on
    the hub, config.json is downloaded. The other arguments are the settings of these names. Raises ValueError
    saying what would be right, and OSError.
    """
    named = [_parse(entry) for entry in entries]
    names = [each.name for each in named]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two models are called {name!r}; give them names of their own, NAME=...")
    needed = prod((mesh or {}).values())
    devices = find_devices(needed)
    if mesh and needed != devices.count:
        stated = ",".join(f"{axis}={size}" for axis, size in mesh.items())
        raise ValueError(
            f"--mesh {stated} is of {needed} devices, and JAX finds {devices.count} ({devices.platform})"
        )
    planned = [_checked(each.plan, each.revision) for each in named]
    distinct = {(each.folder, each.hub_id, each.commit): each for each in planned}
    configs = {each.name: each.config for each in distinct.values() if each.config is not None}
    require_memory(configs, devices, dtype, mesh or {}, max_sequence_length, kv_cache_tokens)
    return planned


def config_alone(entry: str, cache_dir: Path) -> tuple[str, Path, ModelConfig]:
    """Return name, folder and config of a `--model` option, without its weights.

    For a model on the hub, only config.json is downloaded. Raises ValueError saying what would be right.
    """
    named = _parse(entry)
    if named.plan.hub_id is not None:
        folder = Path(_from_hub(named.plan.hub_id, named.revision, "config.json")).parent
    elif named.plan.folder is not None:
        folder = named.plan.folder
    else:
        folder = cache_dir / "models" / smollm2.NAME
        if not folder.is_dir():
            raise ValueError(f"model {SMOLLM2!r} is not here yet; run tinsmith models get {SMOLLM2} first")
    return named.name, folder, _of_model(named.name, folders.stated_config, folder)


def resolve(entry: str, cache_dir: Path, limit: int | None) -> BaseModel:
    """Return the base model of one `--model` option, downloading it if necessary."""
    (planned,) = plan([entry])
    return planned.obtain(cache_dir, limit)


@dataclass(frozen=True)
class _Entry:
    """One `--model` option."""

    plan: Plan
    revision: str | None = None

    @property
    def name(self) -> str:
        return self.plan.name


def _parse(entry: str) -> _Entry:
    """Parse one `--model` option. A folder that exists is taken as it is, whatever its name contains."""
    if not entry.strip():
        raise ValueError("--model is empty; give a folder, a hub id (owner/name) or NAME=one of these")
    if Path(entry).expanduser().is_dir() or "=" not in entry:
        return _source(entry, None)
    # The name and the folder may contain `=` too: split where the right side exists.
    splits = [(entry[: at.start()], entry[at.end() :]) for at in re.finditer("=", entry)]
    of_folders = [split for split in splits if split[0] and _is_here(split[1])]
    if not of_folders and _is_path(entry):
        return _source(entry, None)
    name, source = (of_folders or splits)[0]
    name = name.strip()
    if not name or not name.isprintable():
        raise ValueError(f"--model {entry!r}: the name before the = is {name!r}; write NAME=FOLDER")
    if not source.strip():
        raise ValueError(f"--model {entry!r}: nothing follows the =; write NAME=FOLDER")
    return _source(source, name)


def _source(source: str, name: str | None) -> _Entry:
    path = Path(source).expanduser()
    if path.is_dir():
        folder = path.resolve()
        return _Entry(Plan(name or folder.name, folder=folder))
    if source == SMOLLM2:
        return _Entry(Plan(name or SMOLLM2))
    if path.is_file():
        what = "a GGUF file, which is not supported" if path.suffix == ".gguf" else "a file"
        raise ValueError(f"model {source!r} is {what}; give the folder with config.json and safetensors")
    hub_id, at, revision = source.partition("@")
    if not _is_path(source) and _HUB_ID.fullmatch(hub_id):
        if at and not revision:
            raise ValueError(f"model {source!r}: no revision after the @")
        return _Entry(Plan(name or hub_id, hub_id=hub_id), revision or None)
    if _is_path(source):
        raise ValueError(f"model {source!r}: there is no such folder")
    raise ValueError(f"model {source!r} is neither a folder, nor a hub id (owner/name), nor {SMOLLM2!r}")


def _is_here(source: str) -> bool:
    return source == SMOLLM2 or (bool(source) and Path(source).expanduser().is_dir())


def _is_path(source: str) -> bool:
    """Return whether the text must be a path: it looks like one, or its folder exists."""
    return source.startswith((".", "/", "~")) or ("/" in source and Path(source).parent.is_dir())


def _checked(planned: Plan, revision: str | None) -> Plan:
    """Check that the model can be served; return the plan with its config. Raises ValueError."""
    if planned.folder is not None:
        config = _of_model(planned.name, folders.read_config, planned.folder)
        _of_model(planned.name, folders.check, planned.folder, config)
        return replace(planned, config=config)
    if planned.hub_id is None:
        return planned
    config_file = Path(_from_hub(planned.hub_id, revision, "config.json"))
    config = _of_model(planned.name, folders.stated_config, config_file.parent)
    commit = config_file.parent.name
    return replace(planned, commit=commit, weight_files=_weight_files(planned.hub_id, commit), config=config)


def _of_model(name: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function, putting the model's name in front of its errors."""
    try:
        return function(*arguments)
    except (ValueError, OSError) as error:
        raise ValueError(f"model {name!r}: {error}") from None


def _from_hub(hub_id: str, revision: str | None, file: str) -> str:
    """Download one file, or find it in the cache; return its path."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(hub_id, file, revision=revision)
    except Exception as error:
        raise _not_on_hub(hub_id, revision, error) from None


def _weight_files(hub_id: str, commit: str) -> tuple[str, ...]:
    """List the files on the hub that hold the weights. Raises ValueError if there are none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        there = HfApi().list_repo_files(hub_id, revision=commit)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return ()  # offline, the cache may have them
    if folders.SINGLE in there:
        return (folders.SINGLE,)
    if folders.INDEX in there:
        index = json.loads(Path(_from_hub(hub_id, commit, folders.INDEX)).read_text())
        return (folders.INDEX, *sorted(set(index.get("weight_map", {}).values())))
    others = [name for name in there if name.endswith(_WEIGHTS_THAT_ARE_NOT_READ)]
    has = f"it has {', '.join(others[:3])}, which are not read" if others else "it has no weights"
    raise ValueError(f"model {hub_id!r} has neither {folders.SINGLE} nor {folders.INDEX}; {has}")


def _download(hub_id: str, commit: str | None, weight_files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_BESIDE_WEIGHTS, *(weight_files or ["*.safetensors"])]
    try:
        return Path(snapshot_download(hub_id, revision=commit, allow_patterns=patterns))
    except Exception as error:
        raise _not_on_hub(hub_id, commit, error) from None


def _not_on_hub(hub_id: str, revision: str | None, error: Exception) -> ValueError:
    from huggingface_hub import constants

    which = f"{hub_id}@{revision}" if revision else hub_id
    reason = " ".join(str(error).split())[:300]
    offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    return ValueError(
        f"model {which!r} is not a folder here, and cannot be loaded from the Hugging Face hub{offline}: "
        f"{type(error).__name__}: {reason}"
    )


def _tokenizer_id(planned: Plan, folder: Path) -> str | None:
    """Return the hub id from which clients can load the tokenizer.

    That is the model's own id, the one whose folder in the hub's cache this is, or the one that config.json
    names; None if nothing else is known.
    """
    if planned.hub_id is not None or _HUB_ID.fullmatch(planned.name):
        return planned.hub_id
    kind, *cached = folder.parent.parent.name.split("--", 2)
    if folder.parent.name == "snapshots" and kind == "models":
        return "/".join(cached)
    try:
        stated = json.loads((folder / "config.json").read_text()).get("_name_or_path")
    except (OSError, ValueError):
        return None
    return stated if isinstance(stated, str) and _HUB_ID.fullmatch(stated) else None


def _described(
    name: str, folder: Path, hub_id: str | None, tokenizer_id: str | None, limit: int | None
) -> BaseModel:
    config = _of_model(name, folders.read_config, folder)
    _of_model(name, folders.check, folder, config)
    length = config.max_sequence_length
    return BaseModel(
        name=name,
        folder=folder,
        hub_id=hub_id,
        max_sequence_length=min(length, limit) if limit else length,
        vocab_size=config.vocab_size,
        digest=_of_model(name, folders.digest, folder, config),
        tokenizer_id=tokenizer_id,
    )


# --- the devices of this machine

_ACCELERATORS = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0", "/dev/vfio/vfio")
_PROBE_SECONDS = 300.0


def find_devices(needed: int) -> Devices:
    """Find the devices that the engine will have.

    A short-lived process looks for them, because this one has no JAX; on a machine without accelerators only
    if more than one device is `needed`. Raises ValueError saying in one line why JAX finds none.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    surely_cpu = platforms == "cpu" or (not platforms and not any(map(os.path.exists, _ACCELERATORS)))
    if surely_cpu and needed <= 1:
        return Devices("cpu", 1)
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(GPU_SHARE)}  # as for the engine (`engine_process`)
    quiet = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment = share | os.environ | quiet
    command = [sys.executable, "-m", "tinsmith.engine.devices"]
    try:
        probe = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"JAX did not find its devices within {_PROBE_SECONDS:.0f} s") from None
    if probe.returncode != 0:
        lines = probe.stderr.decode(errors="replace").strip().splitlines() or ["no reason was given"]
        raise ValueError(f"JAX finds no device: {lines[-1][:300]}")
    return msgspec.json.decode(probe.stdout.splitlines()[-1], type=Devices)


# --- whether the models fit into memory


def require_memory(
    models: Mapping[str, ModelConfig],
    devices: Devices,
    dtype: str = "auto",
    mesh: Mapping[str, int] | None = None,
    max_sequence_length: int | None = None,
    kv_cache_tokens: int | None = None,
) -> None:
    """Check that enough memory is free for the smallest engine that can serve these models.

    It holds their weights, the smallest programs, one adapter in training and one sequence in the KV cache.
    Raises ValueError saying how much is needed, for what, how much is free, and what would do.
    """
    on_cpu = devices.platform == "cpu"
    sizes = memory.Mesh.of(mesh or {})
    free = host_memory.free_bytes() if on_cpu else devices.bytes_each
    if free is None or not models:
        return
    available = free // sizes.devices if on_cpu else free  # a CPU's devices share its memory
    kind = ("float32" if on_cpu else "bfloat16") if dtype == "auto" else dtype

    def plan(mesh: memory.Mesh, itemsize: int) -> memory.EnginePlan:
        longest = (min(max_sequence_length or 1 << 62, each.max_sequence_length) for each in models.values())
        served = [
            memory.Served(counts(config), length, itemsize)
            for config, length in zip(models.values(), longest, strict=True)
        ]
        return memory.plan_engine(served, available, mesh, on_cpu=on_cpu, kv_cache_tokens=kv_cache_tokens)

    here = plan(sizes, _ITEMSIZE[kind])
    if here.fits:
        return
    billions = sum(counts(config).parameters for config in models.values()) / 1e9
    of_each = "" if sizes.devices == 1 else " on each device"
    text = (
        f"too large: {', '.join(models)} needs {memory.in_gb(here.needed)}{of_each} "
        f"({memory.in_gb(here.base)} for {billions:.2f} billion parameters as {kind}, the rest for the "
        f"smallest programs, an adapter and a KV cache), and {memory.in_gb(available)} are free"
    )
    if not on_cpu:
        larger = (memory.Mesh(fsdp=2**power) for power in range(1, 10))
        for each in larger:
            if each.shards > sizes.shards and plan(each, _ITEMSIZE[kind]).fits:
                raise ValueError(f"{text}; {memory.number(each.devices)} of them with --mesh {each} would do")
    if kind == "float32":
        text += "; --dtype bfloat16 halves the weights"
    raise ValueError(text)


_ITEMSIZE = {"float32": 4, "bfloat16": 2}
