"""Bodies about inference servers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, StrictInt, StringConstraints

from ..addresses import plain_host
from .body import Body, Id

Port = Annotated[StrictInt, Field(ge=1, le=65535)]
Host = Annotated[
    str,
    StringConstraints(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9._:\[\]-]+$"),
    AfterValidator(plain_host),
]
Word = Annotated[str, StringConstraints(max_length=128)]


class Endpoint(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"host": "10.0.0.2", "port": 30000}]})
    host: Host
    port: Port


class AddEndpoint(Endpoint):
    worker_port: Port | None = None
    world_size: Annotated[StrictInt, Field(ge=1, le=1 << 16)] = 1
    pool: Word = "default"
    receiver_kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"] | None = None
    sync_weights: StrictBool = False
    master_address: Word | None = None
    master_port: Annotated[StrictInt, Field(ge=0, le=65535)] = 0
    group_name: Word = "weight_sync_group"
    buffer_size_mb: Annotated[StrictInt, Field(ge=1, le=1 << 20)] = 1024
    # Extensions: its key, and which of this server's base models it has, where its own name does not say.
    api_key: Annotated[str, StringConstraints(max_length=512, pattern=r"^[!-~]+$")] | None = None
    base_model: Word | None = None


class SyncWeights(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"model_id": "default"}]})
    model_id: Id | None = None
    master_address: Word = ""
    master_port: Annotated[StrictInt, Field(ge=0, le=65535)] = 0
    group_name: Word = "weight_sync_group"
    buffer_size_mb: Annotated[StrictInt, Field(ge=1, le=1 << 20)] = 1024
    flush_cache: StrictBool = False
    cache_invalidation_mode: Literal["auto", "flush", "none"] = "auto"
    pause_mode: Literal["retract", "abort", "in_place"] = "retract"
    weight_version: Word | None = None
    quantization: dict[str, Any] | None = None
    pools: Annotated[list[Word], Field(max_length=64)] | None = None
    # Extensions: other weights than a model's as they are now.
    model_path: Annotated[str, StringConstraints(max_length=1024)] | None = None
    base_model: Word | None = None


class Quantization(Body):
    quant_method: Literal["fp8", "none"]
    fmt: Literal["e4m3"] = "e4m3"
    weight_block_size: (
        Annotated[StrictInt, Field(ge=1, le=4096)]
        | tuple[Annotated[StrictInt, Field(ge=1, le=4096)], Annotated[StrictInt, Field(ge=1, le=4096)]]
        | None  # one scale for a whole matrix
    ) = (128, 128)
    modules_to_not_convert: Annotated[list[Word], Field(max_length=256)] = Field(default_factory=list)
    activation_scheme: Literal["dynamic"] = "dynamic"


class SetQuantization(Body):
    """null, {} or the method `none`: the weights go out as they are."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"quantization": {"quant_method": "fp8", "weight_block_size": [128, 128]}}]
        }
    )
    quantization: Annotated[dict[str, Any], Field(max_length=16)] | None = None
