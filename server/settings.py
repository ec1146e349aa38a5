"""What an operator can set: by option, or by environment (`TINSMITH_` and the name in capitals)."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shlex
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from ..engine import messages
from . import given_keys
from .addresses import Allowed, address, is_loopback
from .ledger.keys import any_in
from .ledger.ownership import sqlite_file

MESH_AXES = ("data", "fsdp", "tensor")


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


class LedgerSettings(BaseSettings):
    """Where the ledger is."""

    model_config = SettingsConfigDict(env_prefix="TINSMITH_", extra="forbid")

    data_dir: Path = Path("tinsmith-data")
    database_url: str | None = None  # None: SQLite in data_dir
    sync_every_commit: bool = False  # SQLite: also survive a loss of power; milliseconds per operation

    @field_validator("database_url")
    @classmethod
    def _a_database_that_can_be_used(cls, url: str | None) -> str | None:
        if url is None:
            return None
        for scheme in (
            "postgres://",
            "postgresql://",
        ):  # psycopg, whether the URL says so or not
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


class Settings(LedgerSettings):
    # Base models: a folder, a hub id (with @REVISION), or NAME=one of them. In the environment separated by
    # commas, or as a JSON list.
    model: Annotated[list[str], NoDecode] = Field(default_factory=list)
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    cache_dir: Path = Field(default_factory=default_cache_dir)
    api_key: Annotated[list[str], NoDecode] = Field(default_factory=list)
    api_key_file: Path | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    mesh: Annotated[dict[str, int], NoDecode] = Field(default_factory=dict)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_rank: int = Field(128, ge=1)
    lora_alpha: float = Field(32.0, gt=0)
    full_weight: bool = False
    max_sequence_length: int | None = Field(None, ge=2)
    kv_cache_tokens: int | None = Field(None, ge=1)
    # Sampler weights on the device: of so many bytes (None: an eighth of its memory, 1 GiB on a CPU), and for
    # so long after they were last sampled. The others wait on disk.
    sampler_bytes: int | None = Field(None, ge=1)
    sampler_idle_seconds: float = Field(600.0, gt=0)
    # Weights that only a sampling session names are removed so long after its session's last sign of life.
    unnamed_sampler_seconds: float = Field(24 * 3600.0, gt=0)

    # SGLang servers that sample for every tenant: a URL, or BASE_MODEL=URL; and their key. Clients may
    # register others only where they are allowed here: HOST, HOST:PORT or a network (10.0.0.0/8).
    sglang: Annotated[list[str], NoDecode] = Field(default_factory=list)
    sglang_api_key: SecretStr | None = None
    sglang_allow: Annotated[list[str], NoDecode] = Field(default_factory=list)
    # Who draws samples that do not say: SGLang where it does the same and is there, else the engine (auto);
    # always the engine (embedded); or SGLang alone, which is then waited for so long.
    sampling_engine: messages.SamplingEngine = "auto"
    sglang_patience_seconds: float = Field(300.0, gt=0)
    # Of the samples that SGLang draws, so many in a hundred are scored by the engine too, for `sampler/kl`.
    sglang_compared_percent: float = Field(2.0, ge=0, le=100)
    # Where the servers see the data directory (None: under the same path); how many adapters are kept on one
    # that has no limit of its own; whether a save goes out as a whole model, in place of what they had.
    sglang_data_dir: Path | None = None
    sglang_adapters: int = Field(32, ge=1)
    sglang_merge: bool = False

    # Whether clients' wandb_config is done, with the network or only into files in data_dir.
    wandb_mode: Literal["online", "offline", "disabled"] = "online"

    max_body_bytes: int = Field(256 << 20, ge=1 << 10)
    max_import_bytes: int = Field(4 << 30, ge=1 << 10)  # of an adapter that becomes a checkpoint
    max_datums: int = Field(16_384, ge=1)
    max_samples: int = Field(1024, ge=1)
    # Of each tenant; `tinsmith keys quota` sets others for one. Models in the engine, bytes of checkpoints,
    # operations and samples that wait for their answers, requests of any kind.
    max_models: int = Field(256, ge=1)
    max_checkpoint_bytes: int = Field(1 << 40, ge=0)
    max_queued_operations: int = Field(10_000, ge=1)
    max_waiting_samples: int = Field(8192, ge=1)
    max_requests_per_second: float = Field(2000.0, gt=0)
    # Of operations, and of samples, that wait for their answers; they wait on the disk.
    max_queued_bytes: int = Field(8 << 30, ge=1)
    # What sessions, models and samplers are called and described with (tags, metadata, names), in the ledger.
    max_metadata_bytes: int = Field(64 << 20, ge=0)
    # A save that was refused for want of room and was not sent again for so long is given up. Between two
    # tries the SDK waits for up to 30 s.
    refused_save_seconds: float = Field(60.0, gt=0)
    # URLs of checkpoints' files need no key for so long. Where a proxy answers clients under another address,
    # they begin with `public_url`.
    signed_url_seconds: float = Field(3600.0, gt=0)
    public_url: str | None = None
    # Without keys, requests to and pages of other hosts than this machine are refused, but for these:
    # names, *.example.org, or * for any.
    allowed_hosts: Annotated[list[str], NoDecode] = Field(default_factory=list)
    # Clients are told to exchange their key for tokens (JSON Web Tokens), which are good for so long. The SDK
    # takes a new one when a minute is left.
    token_exchange: bool = False
    token_seconds: float = Field(3600.0, ge=1)
    # The audit log, and the hours of usage, go back so far.
    audit_seconds: float = Field(90 * 24 * 3600.0, gt=0)
    usage_seconds: float = Field(400 * 24 * 3600.0, gt=0)
    # Clients are told to upload their custom losses, which then run here; off: in the client.
    custom_loss_server_side: bool = True
    # A connection on which a request that has begun, or an answer, does not move for so long is closed.
    stall_seconds: float = Field(60.0, gt=0)
    long_poll_seconds: float = Field(25.0, ge=0, le=30)
    # Longer than the six minutes for which the SDK resends a submit.
    gap_grace_seconds: float = Field(400.0, gt=0)
    # A model's state is saved after that many operations or bytes of them, so that few need to be kept.
    snapshot_operations: int = Field(2000, ge=1)
    snapshot_bytes: int = Field(1 << 30, ge=1)
    # The models of a session without a heartbeat or an operation for so long are saved and leave the engine,
    # until they are needed again.
    session_idle_seconds: float = Field(600.0, gt=0)
    # An operation that the engine dies of is tried again, until that many died of it within the window.
    deaths_per_operation: int = Field(3, ge=1)
    death_window_seconds: float = Field(600.0, gt=0)
    # An engine that gives no sign of life for so long (while it loads, five times that) is killed, and the
    # next one started. It gives them while it computes and compiles.
    engine_silence_seconds: float = Field(60.0, gt=0)
    # Answers are kept for so long, and so many bytes of them; a later poll is 410. How often that is looked
    # at, and directories are removed that nobody needs.
    answer_seconds: float = Field(24 * 3600.0, gt=0)
    answer_bytes: int = Field(4 << 30, ge=0)
    sweep_seconds: float = Field(600.0, gt=0)
    # A model that was deleted, unloaded or whose session has finished, and that has no checkpoints, leaves
    # the ledger after so long: it is listed no more, and its id is unknown.
    ended_model_seconds: float = Field(30 * 24 * 3600.0, gt=0)
    # With less than so much free on the data directory's disk, submits are refused with 507.
    disk_reserve_bytes: int = Field(256 << 20, ge=0)
    stop_patience_seconds: float = Field(600.0, gt=0)

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

    @field_validator("api_key", "sglang", "sglang_allow", "allowed_hosts", mode="before")
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

    @field_validator("api_key_file")
    @classmethod
    def _a_file_that_can_be_read(cls, file: Path | None) -> Path | None:
        if file is not None:
            _text(file)
        return file

    @model_validator(mode="after")
    def _keys_that_clients_can_send(self) -> Settings:
        given_keys.parse(self.api_keys)
        return self

    @model_validator(mode="after")
    def _keys_beyond_loopback(self) -> Settings:
        if not self.is_loopback and not self.api_keys and not any_in(self.ledger_url):
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
        """Those given and those in the file, one a line, `#` for comments."""
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
        """Each with the base model that it was named for."""
        pairs = (entry.rpartition("=") for entry in self.sglang)
        return {url.rstrip("/"): name or None for name, _, url in pairs}

    @property
    def payload_dir(self) -> Path:
        """Beside the ledger, where that is a file."""
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
            beat_seconds=self.engine_silence_seconds / 10,
        )


def _text(file: Path) -> str:
    """Raises ValueError for a file of keys that cannot be read."""
    try:
        return file.expanduser().read_text("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a text file in UTF-8") from None
