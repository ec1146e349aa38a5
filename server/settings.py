"""Settings of a server: options of `tinsmith serve`, the environment or a file.

The first of these that has a value wins. A setting `x_y` is `TINSMITH_X_Y` in the environment and `x_y` in
the file. `docs/settings.md` is generated from the fields' docstrings; each class is a section there.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    SecretStr,
    TypeAdapter,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from ..engine import messages
from .addresses import Allowed, address, is_loopback
from .ledger.accounts import digest, has_keys
from .ledger.ownership import sqlite_file

MESH_AXES = ("data", "fsdp", "expert", "tensor")


def default_cache_dir() -> Path:
    return Path(os.environ.get("TINSMITH_CACHE_DIR") or "~/.cache/tinsmith").expanduser()


def read_mesh(text: str) -> dict[str, int]:
    """Read `data=2,fsdp=4,tensor=1`. Raises ValueError saying what would be right."""
    axes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = part.partition("=")
        if name not in MESH_AXES or not re.fullmatch("[0-9]{1,6}", size) or int(size) < 1:
            raise ValueError(f"{part!r}; write data=2,fsdp=4,tensor=1 with any of {', '.join(MESH_AXES)}")
        if name in axes:
            raise ValueError(f"{part!r}: {name} is there twice")
        axes[name] = int(size)
    return axes


def read_size(value: Any) -> Any:
    """Read a number of bytes, perhaps with a unit, such as `256MiB`. Raises ValueError."""
    if not isinstance(value, str):
        return value
    try:
        return int(TypeAdapter(ByteSize).validate_python(value))
    except ValueError:
        raise ValueError(f"{value!r} is no size; write bytes, or a number with MB, GB, MiB or GiB") from None


Size = Annotated[int, BeforeValidator(read_size)]


class Section(BaseSettings):
    """Settings that belong together. Unknown names are errors."""

    model_config = SettingsConfigDict(env_prefix="TINSMITH_", extra="forbid", use_attribute_docstrings=True)


class LedgerSettings(Section):
    """Data and the ledger."""

    data_dir: Path = Path("tinsmith-data")
    """The directory of the ledger, checkpoints and payloads. One server owns it at a time."""
    database_url: str | None = None
    """The ledger's database, as `postgresql://USER:PASSWORD@HOST/NAME` or `sqlite:////path/ledger.db`. The
    default is SQLite in the data directory. SQLite must not be on a network volume."""
    sync_every_commit: bool = False
    """SQLite only: flush every commit to the disk, so that the ledger also survives a loss of power. Costs a
    few milliseconds per operation."""

    @field_validator("database_url")
    @classmethod
    def _a_database_that_can_be_used(cls, url: str | None) -> str | None:
        if url is None:
            return None
        for scheme in ("postgres://", "postgresql://"):  # psycopg, whether the URL says so or not
            if url.startswith(scheme):
                url = f"postgresql+psycopg://{url.removeprefix(scheme)}"
        try:
            parsed = make_url(url)
        except ArgumentError:
            parsed = None
        if parsed is None or parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise ValueError("write sqlite:////path/to/ledger.db or postgresql://USER:PASSWORD@HOST/NAME")
        try:
            parsed.get_dialect().import_dbapi()
        except ImportError as error:
            raise ValueError(f"the package {error.name} is missing; install it beside Tinsmith") from None
        except NoSuchModuleError:
            raise ValueError(f"{parsed.drivername} is no driver that SQLAlchemy knows") from None
        if (file := sqlite_file(url)) is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"{file.absolute().parent} is no folder")
        return url

    @property
    def ledger_url(self) -> str:
        if self.database_url is not None:
            return self.database_url
        file = URL.create("sqlite", database=str(self.data_dir.resolve() / "ledger.db"))
        return file.render_as_string(hide_password=False)  # a path may have ? and % in it


class ServingSettings(Section):
    """Addresses, keys and logs."""

    host: str = "127.0.0.1"
    """The address to listen on. Any address but loopback needs a key."""
    port: int = Field(8000, ge=0, le=65535)
    """The port to listen on; 0 chooses a free one."""
    api_key: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """A key that clients may send, as `KEY` or `TENANT=KEY`. Keys begin with `tml-`. `tinsmith keys create`
    is better: it stores keys in the ledger, where they can be revoked."""
    api_key_file: Path | None = None
    """A file with keys, one per line, as above. `#` begins a comment."""
    admin: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """A tenant whose keys show the usage of all tenants in the console. Nothing else of other tenants is
    shown."""
    metrics_token: SecretStr | None = None
    """A bearer token for Prometheus, which opens `/metrics` and nothing else. If it is set, keys no
    longer open `/metrics`; if not, every key does."""
    otlp_endpoint: str | None = None
    """An OpenTelemetry collector, such as `http://collector:4318`, which receives a trace of every operation
    (OTLP over HTTP). Needs the extra `otel`."""
    public_url: str | None = None
    """The address at which clients reach the server through a proxy. Download URLs begin with it."""
    allowed_hosts: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """Host names under which a server without keys may be reached, besides this machine's: a name,
    `*.example.org`, or `*` for any. Requests to other hosts, and from their web pages, are refused."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is logged, to standard error and to `logs/` in the data directory (see `tinsmith logs`)."""
    log_format: Literal["text", "json"] = "text"
    """`json` writes one object per line, with the ids of the request, the operation and the tenant, and
    nothing else is printed."""
    stall_seconds: float = Field(60.0, gt=0)
    """A connection is closed if a request's body or an answer has not moved for this long."""
    long_poll_seconds: float = Field(25.0, ge=0, le=30)
    """How long a poll waits for an answer before the client is told to poll again."""
    stop_patience_seconds: float = Field(600.0, gt=0)
    """How long a stopping server waits for running operations before it ends the engine."""
    stream_keep_alive_seconds: float = Field(15.0, gt=0)
    """A stream of samples that has had nothing to send for this long sends a comment, so that no proxy or
    client closes it."""

    @field_validator("otlp_endpoint")
    @classmethod
    def _a_collector_that_can_be_sent_to(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
            raise ValueError("write the collector's address, such as http://collector:4318")
        if url is not None and importlib.util.find_spec("opentelemetry.exporter") is None:
            raise ValueError("the exporter is missing: install Tinsmith with the extra otel")
        return url


class ModelSettings(Section):
    """Base models, devices and sequences."""

    model: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """Base models to serve: a folder, a hub id (`org/name` or `org/name@REVISION`), `smollm2-135m`, or
    `NAME=` and one of these. In the environment they are separated by commas, or given as a JSON
    list."""
    cache_dir: Path = Field(default_factory=default_cache_dir)
    """The directory of downloaded models and compiled programs. It may be deleted."""
    mesh: Annotated[dict[str, int], NoDecode] = Field(default_factory=dict)
    """The arrangement of the devices, such as `data=2,fsdp=4`: `data` replicates, `fsdp` shards parameters
    and batches, `expert` does too but divides the experts of a mixture, `tensor` shards matrices. The default
    is one device."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The dtype of base weights and activations. `auto` is float32 on a CPU and bfloat16 elsewhere. Adapters,
    gradients and Adam's moments are always float32."""
    max_rank: int = Field(128, ge=1)
    """The largest LoRA rank that a client may request."""
    lora_alpha: float = Field(32.0, gt=0)
    """LoRA's alpha for models whose client sets none: an adapter's product is scaled by alpha / rank."""
    full_weight: bool = False
    """Allow clients to train full weights (rank 0)."""
    warm_up: bool = False
    """Compile the programs of common requests at the start, so that no client waits for them: training and
    sampling up to 2,048 tokens with an adapter of rank `warm_up_rank`."""
    warm_up_rank: int = Field(32, ge=1)
    """The LoRA rank for which the warm-up compiles."""
    max_sequence_length: int | None = Field(None, ge=2)
    """The longest sequence, in tokens. The default is the model's own limit."""
    kv_cache_tokens: int | None = Field(None, ge=1)
    """Positions of keys and values that the sampler keeps on the device. The default follows from the free
    memory."""
    sampler_bytes: Size | None = Field(None, ge=1)
    """The most bytes of sampler weights on the device; others wait on the disk. Without a limit, sampler
    weights share the engine's memory budget with models in training; the least recently used give way."""
    sampler_idle_seconds: float = Field(600.0, gt=0)
    """Sampler weights leave the device when they have not been sampled for this long."""
    unnamed_sampler_seconds: float = Field(24 * 3600.0, gt=0)
    """Unnamed sampler weights are deleted this long after their session's last sign of life."""


class SamplingSettings(Section):
    """Sampling on SGLang servers. See [sglang.md](sglang.md)."""

    sglang: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """SGLang servers that draw samples for every tenant: a URL, or `BASE_MODEL=URL`."""
    sglang_api_key: SecretStr | None = None
    """The key of these servers."""
    sglang_allow: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """Servers that clients may register: `HOST`, `HOST:PORT` or a network such as `10.0.0.0/8`. The default
    is none."""
    sampling_engine: messages.SamplingEngine = "auto"
    """What draws a sample whose request names no engine. `auto`: SGLang if it can draw exactly what was
    requested, else this server's engine. `embedded`: always this server's engine. `sglang`: only SGLang."""
    sglang_patience_seconds: float = Field(300.0, gt=0)
    """How long `sglang` waits for a healthy server before a sample fails."""
    sglang_compared_percent: float = Field(2.0, ge=0, le=100)
    """The percentage of SGLang's samples that the engine scores too, for comparison (metric `sampler/kl`)."""
    sglang_data_dir: Path | None = None
    """The data directory's path on the SGLang servers. The default is the same path as here."""
    sglang_adapters: int = Field(32, ge=1)
    """How many adapters stay loaded on an SGLang server that has no limit of its own."""
    sglang_merge: bool = False
    """Send saved weights to SGLang as a whole merged model, not as an adapter."""


class LimitSettings(Section):
    """Limits. `tinsmith keys quota` changes the limits of a single tenant."""

    max_body_bytes: Size = Field(256 << 20, ge=1 << 10)
    """The largest body of a training request. Sampling requests may have 16 MiB, others 1 MiB."""
    max_import_bytes: Size = Field(4 << 30, ge=1 << 10)
    """The largest adapter that can be imported."""
    max_datums: int = Field(16_384, ge=1)
    """The most datums in one request."""
    max_samples: int = Field(1024, ge=1)
    """The most samples of one prompt in one request."""
    max_models: int = Field(256, ge=1)
    """The most models of one tenant that the engine holds at a time."""
    max_checkpoint_bytes: Size = Field(1 << 40, ge=0)
    """The most bytes of checkpoints of one tenant."""
    max_queued_operations: int = Field(10_000, ge=1)
    """The most unanswered training operations of one tenant."""
    max_waiting_samples: int = Field(8192, ge=1)
    """The most unanswered samples of one tenant."""
    max_requests_per_second: float = Field(2000.0, gt=0)
    """The most requests of any kind that one tenant may send per second."""
    max_queued_bytes: Size = Field(8 << 30, ge=1)
    """The most bytes of one tenant's unanswered operations and samples, which wait on the disk."""
    max_metadata_bytes: Size = Field(64 << 20, ge=0)
    """The most bytes of one tenant's tags, metadata and names (of sessions, models and samplers) in the
    ledger."""
    disk_reserve_bytes: Size = Field(256 << 20, ge=0)
    """If less than this is free on the data directory's disk, submits are refused with 507."""


class AccountSettings(Section):
    """Tokens, signed URLs, and what is recorded."""

    signed_url_seconds: float = Field(3600.0, gt=0)
    """How long the signed URL of a checkpoint's file is valid. It needs no key."""
    token_exchange: bool = False
    """Tell clients to exchange their key for JSON Web Tokens."""
    token_seconds: float = Field(3600.0, ge=1)
    """How long such a token is valid. The SDK takes a new one when a minute is left."""
    audit_seconds: float = Field(90 * 24 * 3600.0, gt=0)
    """How long the audit log goes back."""
    usage_seconds: float = Field(400 * 24 * 3600.0, gt=0)
    """How long the hourly usage goes back."""
    step_metrics_bytes: Size = Field(64 << 20, ge=0)
    """The most bytes of step metrics of one tenant. Beyond it, the largest runs keep fewer steps."""
    step_metrics_seconds: float = Field(30 * 24 * 3600.0, gt=0)
    """Runs that have made no step for this long keep the metrics of fewer steps."""
    ended_model_seconds: float = Field(30 * 24 * 3600.0, gt=0)
    """A model without checkpoints leaves the ledger this long after it was deleted or unloaded, or after its
    session finished. It is then no longer listed, and its id is unknown."""
    wandb_mode: Literal["online", "offline", "disabled"] = "online"
    """What a client's `wandb_config` does: `online` sends metrics to Weights & Biases, `offline` writes them
    to files in the data directory, `disabled` refuses the request."""
    custom_loss_server_side: bool = True
    """Tell clients to upload custom losses, which then run on the server. If off, they run in the client."""


class ReliabilitySettings(Section):
    """Waiting, saving and recovery. See [reliability.md](reliability.md)."""

    gap_grace_seconds: float = Field(400.0, gt=0)
    """How long operations wait for a missing `seq_id` before they fail. It should be longer than the SDK
    resends a request (six minutes)."""
    refused_save_seconds: float = Field(60.0, gt=0)
    """A save that was refused for lack of disk space is given up if the client does not send it again within
    this time. The SDK waits up to 30 s between two tries."""
    snapshot_operations: int = Field(2000, ge=1)
    """A model's state is saved after this many operations, so that a recovery has few to replay."""
    snapshot_bytes: Size = Field(1 << 30, ge=1)
    """A model's state is saved after this many bytes of operations."""
    session_idle_seconds: float = Field(600.0, gt=0)
    """When a session has sent no heartbeat and no operation for this long, its models are saved and leave the
    engine until they are needed."""
    deaths_per_operation: int = Field(3, ge=1)
    """An operation fails after the engine has died while running it this many times. Until then it is tried
    again."""
    death_window_seconds: float = Field(600.0, gt=0)
    """Deaths of the engine count together (`deaths_per_operation`) if they happen within this time."""
    engine_silence_seconds: float = Field(60.0, gt=0)
    """An engine that shows no sign of life for this long is killed and started again; while it loads models,
    five times as long. It shows them while it computes and compiles, too."""
    answer_seconds: float = Field(24 * 3600.0, gt=0)
    """How long answers are kept. A later poll is answered 410."""
    answer_bytes: Size = Field(4 << 30, ge=0)
    """The most bytes of answers that are kept."""
    sweep_seconds: float = Field(600.0, gt=0)
    """How often expired answers and unused directories are removed."""


class Settings(
    ModelSettings,
    ServingSettings,
    LedgerSettings,
    SamplingSettings,
    LimitSettings,
    AccountSettings,
    ReliabilitySettings,
):
    """All settings of a server."""

    @field_validator("model", mode="before")
    @classmethod
    def _list_of_models(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        if Path(value).expanduser().is_dir() or Path(value.partition("=")[2] or value).expanduser().is_dir():
            return [value]  # a folder with a comma in its name
        return [part.strip() for part in value.split(",") if part.strip()]

    @field_validator("api_key", "admin", "sglang", "sglang_allow", "allowed_hosts", mode="before")
    @classmethod
    def _comma_separated(cls, value: object) -> object:
        return (
            [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        )

    @field_validator("api_key", mode="before")
    @classmethod
    def _no_empty_list_of_keys(cls, value: object) -> object:
        if isinstance(value, str) and not value.replace(",", "").strip():
            raise ValueError("it is set, but has no key in it; unset it to serve without keys")
        return value

    @field_validator("mesh", mode="before")
    @classmethod
    def _axes(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return read_mesh(value)

    @model_validator(mode="after")
    def _known_addresses(self) -> Settings:
        Allowed(self.sglang_urls, self.sglang_allow).close()
        return self

    @field_validator("allowed_hosts")
    @classmethod
    def _names_of_hosts(cls, names: list[str]) -> list[str]:
        for name in names:
            if not re.fullmatch(r"\*|(\*\.)?[A-Za-z0-9_-][A-Za-z0-9._-]*", name) and address(name) is None:
                raise ValueError(
                    f"{name!r}: write a host's name without scheme and port, *.example.org, or *"
                )
        return names

    @field_validator("public_url")
    @classmethod
    def _an_address_that_urls_can_begin_with(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_right = False
        if not is_right or parts.query or parts.fragment:
            raise ValueError(f"{url!r}: write https://HOST, https://HOST:PORT or https://HOST/PATH")
        return url

    @field_validator("api_key_file")
    @classmethod
    def _a_file_that_can_be_read(cls, file: Path | None) -> Path | None:
        if file is not None:
            _text(file)
        return file

    @model_validator(mode="after")
    def _keys_that_clients_can_send(self) -> Settings:
        parse_keys(self.api_keys)
        return self

    @model_validator(mode="after")
    def _keys_beyond_loopback(self) -> Settings:
        if not self.is_loopback and not self.api_keys and not has_keys(self.ledger_url):
            where = "" if self.database_url else f" --data-dir {shlex.quote(str(self.data_dir))}"
            raise ValueError(
                f"host {self.host} can be reached from other machines, and no API key is set. Make one "
                f"with tinsmith keys create NAME{where}, give one with --api-key tml-... (or "
                "--api-key-file), or bind to 127.0.0.1"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def own_hosts(self) -> list[str]:
        """The names by which clients may reach a server without keys, besides those of loopback."""
        public = urlsplit(self.public_url or "").hostname
        return [*self.allowed_hosts, *([public] if public and not is_loopback(public) else [])]

    @property
    def api_keys(self) -> list[str]:
        """All keys: the given ones and those in the file, one per line, with `#` for comments."""
        keys = list(self.api_key)
        if self.api_key_file is not None:
            lines = (line.strip() for line in _text(self.api_key_file).splitlines())
            in_file = [line for line in lines if line and not line.startswith("#")]
            if not in_file:
                raise ValueError(f"api_key_file: {self.api_key_file} has no key in it")
            keys += in_file
        return keys

    @property
    def sglang_urls(self) -> dict[str, str | None]:
        """The SGLang servers, each with the base model that it was named for."""
        pairs = (entry.rpartition("=") for entry in self.sglang)
        return {url.rstrip("/"): name or None for name, _, url in pairs}

    @property
    def payload_dir(self) -> Path:
        """The folder of payloads: beside the ledger if that is a file."""
        ledger = sqlite_file(self.ledger_url)
        return (self.data_dir if ledger is None else ledger.parent).resolve() / "payloads"

    def engine_config(self, base_models: list[messages.BaseModel]) -> messages.EngineConfig:
        return messages.EngineConfig(
            address="",  # the socket's owner fills it in
            data_dir=str(self.data_dir.resolve()),
            cache_dir=str(self.cache_dir.resolve()),
            base_models=base_models,
            dtype=self.dtype,
            mesh=self.mesh,
            max_rank=self.max_rank,
            full_weight=self.full_weight,
            max_sequence_length=self.max_sequence_length,
            kv_cache_tokens=self.kv_cache_tokens,
            sampler_bytes=self.sampler_bytes,
            sampler_idle_seconds=self.sampler_idle_seconds,
            log_level=self.log_level,
            log_format=self.log_format,
            beat_seconds=self.engine_silence_seconds / 10,
        )


def _text(file: Path) -> str:
    """Read a file of keys. Raises ValueError if it cannot be read."""
    try:
        return file.expanduser().read_text("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a text file in UTF-8") from None


# --- API keys that are given at the start, as `KEY` or `TENANT=KEY`

PREFIX = "tml-"
"""The beginning of every key: the SDK refuses others before it calls a server."""
_MAX_CHARACTERS = 512
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_KEY = re.compile(rf"{PREFIX}[!-~]+")  # what a header can carry, without spaces


@dataclass(frozen=True)
class GivenKey:
    """One key and its tenant. `identifier` is part of the key's digest."""

    owner: str
    digest: bytes

    @property
    def identifier(self) -> str:
        return self.digest.hex()[:12]


def is_owner(name: str) -> bool:
    """Return whether a tenant can have this name."""
    return _OWNER.fullmatch(name) is not None


def parse_keys(entries: Iterable[str]) -> list[GivenKey]:
    """Parse the keys that were given at the start.

    Raises ValueError for a key that no client could send, without repeating the key. Several keys may belong
    to one tenant, but no key to two. A key without a tenant's name belongs to a tenant of its own.
    """
    found: dict[bytes, GivenKey] = {}
    for number, entry in enumerate(entries, 1):
        key = _parse_entry(entry, number)
        known = found.setdefault(key.digest, key)
        if known.owner != key.owner:
            raise ValueError(f"API key {number}: {known.owner} and {key.owner} have the same key")
    return list(found.values())


def _parse_entry(entry: str, number: int) -> GivenKey:
    entry = entry.strip()
    owner, separator, key = entry.partition("=")
    has_owner = bool(separator) and not owner.startswith(PREFIX)  # a key may contain '='
    if not has_owner:
        owner, key = "", entry
    if has_owner and not is_owner(owner):
        raise ValueError(f"API key {number}: its tenant's name must be 1 to 64 letters, digits and . _ - @")
    where = f"API key {number} (of {owner})" if owner else f"API key {number}"
    if not key or key == PREFIX:
        raise ValueError(f"{where} is empty; write {PREFIX}..., or TENANT={PREFIX}...")
    if not key.startswith(PREFIX):
        raise ValueError(f"{where} does not begin with {PREFIX}; clients refuse to send such a key")
    if not _KEY.fullmatch(key) or len(key) > _MAX_CHARACTERS:
        raise ValueError(
            f"{where}: a key has up to {_MAX_CHARACTERS} printable ASCII characters and no spaces"
        )
    of_key = digest(key)
    return GivenKey(owner or f"key-{of_key.hex()[:12]}", of_key)
