"""The answers of OpenAI's and SGLang's routes, and of those about inference servers.

As in `responses.py`, these types describe what the handlers send.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from .responses import Numbers

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
