"""Bodies about inference servers.

The answers of OpenAI's and SGLang's routes, and of those about inference servers.

As in `responses.py`, these types describe what the handlers send.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, StrictInt, StringConstraints
from typing_extensions import TypedDict

from ..addresses import plain_host
from .body import Body, Id
from .responses import Numbers

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


# OpenAI's completions. The log-prob of a token that nothing predicts is null.


class CachedTokens(TypedDict):
    """Tokens of the prompts whose prefill was found in the cache."""

    cached_tokens: int


class TokenUsage(TypedDict):
    """Tokens read and drawn, over all prompts and samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class WeightVersion(TypedDict):
    """Which weights were sampled."""

    weight_version: str


class CompletionLogprobs(TypedDict):
    """Log-probs, token by token. `text_offset`: where each token begins, in characters."""

    tokens: list[str]
    token_logprobs: Numbers
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One sample. `finish_reason` is null in a stream's chunks before the last."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: CompletionLogprobs | None


class TextCompletion(TypedDict):
    """Samples of one prompt or several, those of the first prompt first."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    metadata: WeightVersion
    usage: TokenUsage


class TextCompletionChunk(TypedDict):
    """One event of a stream. The last has no choices, and `usage`, if `include_usage` asks for it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    metadata: WeightVersion
    usage: NotRequired[TokenUsage | None]


class ChatToken(TypedDict):
    """A token and its log-prob. `bytes`: the token in UTF-8."""

    token: str
    logprob: float | None
    bytes: list[int]


class ChatTokenLogprobs(ChatToken):
    """A sampled token, and the most likely ones in its place."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(TypedDict):
    """Log-probs, token by token."""

    content: list[ChatTokenLogprobs]
    refusal: None


class AssistantMessage(TypedDict):
    """The model's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One sample."""

    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChatLogprobs | None


class ChatCompletion(TypedDict):
    """Samples of the next turn of a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    metadata: WeightVersion
    usage: TokenUsage


class ChatDelta(TypedDict):
    """New text; `role` comes with a choice's first."""

    role: NotRequired[Literal["assistant"]]
    content: str


class ChatChunkChoice(TypedDict):
    """One sample's new text. `finish_reason` is null before the last."""

    index: int
    delta: ChatDelta
    finish_reason: Literal["stop", "length"] | None
    logprobs: ChatLogprobs | None


class ChatCompletionChunk(TypedDict):
    """One event of a stream. The last has no choices, and `usage`, if `include_usage` asks for it."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    metadata: WeightVersion
    usage: NotRequired[TokenUsage | None]


class ServedModel(TypedDict):
    """A model that can be sampled by its `id`. `parent`: of an adapter, its base model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ServedModels(TypedDict):
    """The base models, and the caller's named weights."""

    object: Literal["list"]
    data: list[ServedModel]


# SGLang's /generate.

TokenEntry = tuple[float | None, int, str | None]
"""A token: its log-prob (null for one that nothing predicts), its id, and its text if that was asked for."""
TokenRow = list[TokenEntry]


class LengthReached(TypedDict):
    """The sample has as many tokens as it may."""

    type: Literal["length"]
    length: int


class StopMatched(TypedDict):
    """The sample ended with a stop: this token, or this text."""

    type: Literal["stop"]
    matched: int | str | None


class WeightSpan(TypedDict):
    """The weights that drew the tokens from `start` to before `end`."""

    version: str
    start: int
    end: int


class GenerationInfo(TypedDict):
    """About one sample. `finish_reason` is null in a stream's events before the last. What has a log-prob in
    its name is there if `return_logprob` asks for it."""

    id: str
    finish_reason: LengthReached | StopMatched | None
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    num_retractions: int
    weight_version: str
    weight_versions: list[WeightSpan]
    cached_tokens: NotRequired[int]
    e2e_latency: NotRequired[float]
    input_token_logprobs: NotRequired[TokenRow]
    output_token_logprobs: NotRequired[TokenRow]
    output_token_logprobs_length: NotRequired[int]
    input_top_logprobs: NotRequired[list[TokenRow | None]]
    output_top_logprobs: NotRequired[list[TokenRow]]
    input_token_ids_logprobs: NotRequired[list[TokenRow | None]]
    output_token_ids_logprobs: NotRequired[list[TokenRow]]


class Generation(TypedDict):
    """One sample. `index`: in a stream of several, which of them it is."""

    text: str
    output_ids: list[int]
    meta_info: GenerationInfo
    prompt_token_ids: NotRequired[list[int]]
    index: NotRequired[int]


Generated = Generation | list[Generation]
"""A list if there are several prompts, or several samples of one."""


# What clients of inference servers ask first.


class ServedModelInfo(TypedDict):
    """The first base model, as SGLang describes its own."""

    model_path: str
    tokenizer_path: str
    is_generation: Literal[True]
    preferred_sampling_params: None
    weight_version: str


class ServerInfo(TypedDict):
    """The server, as SGLang describes itself."""

    model_path: str
    served_model_name: str
    tp_size: int
    dtype: str
    quantization: None
    kv_cache_dtype: str
    enable_lora: bool
    max_lora_rank: int
    version: str


# Inference servers that a tenant names.


class RemoteServerInfo(TypedDict):
    """What an inference server says of itself."""

    model_path: str | None
    served_model_name: str | None
    tp_size: int
    version: str
    enable_lora: bool
    max_lora_rank: int | None
    quantization: str | None
    dtype: NotRequired[str]
    context_length: NotRequired[int | None]


class InferenceEndpoint(TypedDict):
    """An inference server. `problem`: why it is not used, or null. `running`: requests that it works on."""

    host: str
    port: int
    worker_port: int | None
    world_size: int
    pool: str
    healthy: bool
    server_info: RemoteServerInfo | None
    problem: str | None
    base_model: NotRequired[str | None]
    weight_version: NotRequired[str | None]
    running: NotRequired[int]


class AddedEndpoint(TypedDict):
    """Whether the server was registered; if not, `message` says why."""

    success: bool
    message: str
    endpoint: InferenceEndpoint
    weights_synced: bool
    sync_message: str | None


class RemovedEndpoint(TypedDict):
    """Whether the server was registered before."""

    success: bool
    message: str


class OperatorEndpoints(TypedDict):
    """How many inference servers the operator has named for every tenant."""

    count: int
    healthy: int


class InferenceEndpoints(TypedDict):
    """The caller's inference servers, and how many there are for every tenant."""

    endpoints: list[InferenceEndpoint]
    count: int
    of_operator: OperatorEndpoints


class SyncedEndpoint(TypedDict):
    """One server's part of a sync."""

    host: str
    port: int
    success: bool
    message: str
    seconds: dict[str, float]


class SyncedWeights(TypedDict):
    """Whether every server has the weights. Times are in seconds."""

    success: bool
    message: str
    transfer_time: float
    total_bytes: int
    num_parameters: int
    num_buckets: int
    timing_breakdown: dict[str, float]
    endpoints_synced: list[SyncedEndpoint]
    cache_invalidation_mode: Literal["flush"]
    flush_cache: Literal[True]
    pause_mode: Literal["abort", "wait"]
    weight_version: NotRequired[str]


class SyncQuantization(TypedDict):
    """The format in which syncs send weights; null: as they are."""

    quantization: dict[str, Any] | None
    message: str
