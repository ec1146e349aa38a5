"""The answers of all routes but OpenAI's and `/generate`, as the OpenAPI document describes them.

These types describe; they do not run. A handler's answer is sent as the handler made it, because validating
and writing it a second time would cost more than the handler itself. The tests in `tests/rest` compare every
answer that they get with these types. `NotRequired`: some answers lack the key. `| None`: it may be null.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from ...engine.messages import GradNormalization, SamplingEngine, TargetAlignment

Numbers = list[float | None]
"""Numbers of a tensor. JSON has no NaN and no infinity: null stands for them."""
Metrics = dict[str, float | None]
TokenLogprobs = list[list[tuple[int, float]] | None]
"""The most likely tokens at each position, as pairs of a token and its log-prob; null if there are none."""


# Requests that were accepted, and what a poll of one answers.


class Future(TypedDict):
    """The request was accepted. Poll retrieve_future with `request_id` for its result."""

    request_id: str
    model_id: NotRequired[str]


class CreateModelFuture(Future):
    message: str
    warning_message: NotRequired[str]


class SampleFuture(Future):
    """Samples are being drawn. `sample_sequence_ids` name them in later importance-sampling losses."""

    sample_sequence_ids: list[str]


class PendingFuture(TypedDict):
    """There is no result yet: poll again. `queue_state_reason` says what the engine is doing. The state is
    `paused_capacity` while it loads, compiles or is started again."""

    type: Literal["try_again"]
    status: Literal["pending"]
    result: None
    request_id: str
    queue_state: Literal["active", "paused_capacity", "paused_rate_limit"]
    queue_state_reason: str


class FailedFuture(TypedDict):
    """The request was accepted, and failed when it ran."""

    error: str
    category: Literal["user", "server"]
    detail: str
    status: Literal["failed"]
    status_code: int


class ResultSize(TypedDict):
    """The result is large. Poll again without `allow_metadata_only` to receive it."""

    status: Literal["complete_metadata"]
    response_payload_size: int


class DenseTensor(TypedDict):
    """A tensor, flattened in row-major order."""

    data: Numbers
    dtype: Literal["float32", "int64", "int32"]
    shape: list[int]


class PromptTensor(DenseTensor):
    """A tensor; with the two index lists it is in compressed sparse rows."""

    sparse_crow_indices: NotRequired[list[int]]
    sparse_col_indices: NotRequired[list[int]]


class DatumOutput(TypedDict):
    """The outputs of one datum. The losses are there if the request or its dialect asks for them."""

    logprobs: DenseTensor
    elementwise_loss: NotRequired[DenseTensor]
    loss: NotRequired[DenseTensor]


class ForwardBackwardResult(TypedDict):
    """The result of forward and of forward_backward, in the order of the request's datums."""

    model_id: str
    loss_fn_output_type: Literal["ArrayRecord"]
    loss_fn_outputs: list[DatumOutput]
    metrics: Metrics
    info: dict[str, Any]


class OptimStepResult(TypedDict):
    """The result of optim_step. `step_num` is the client's own count, given back."""

    model_id: str
    success: Literal[True]
    metrics: Metrics
    grad_norm: float | None
    step_count: int | None
    learning_rates: list[float]
    step_num: NotRequired[int]
    info: dict[str, Any]


class AbortGradientEpochResult(TypedDict):
    type: Literal["abort_gradient_epoch"]
    model_id: str
    success: Literal[True]
    info: dict[str, Any]


class SampledSequence(TypedDict):
    """One sample. `text` is left out for the Tinker SDK, which has the tokenizer."""

    tokens: list[int]
    logprobs: Numbers
    stop_reason: Literal["stop", "length"]
    finish_reason: Literal["stop", "length"]
    text: NotRequired[str]
    topk_sampled_logprobs: NotRequired[TokenLogprobs]


class AlternativeTokens(TypedDict):
    """Tokens drawn at each position of the prompt, and their log-probs."""

    tokens: DenseTensor
    logprobs: DenseTensor


class SampleResult(TypedDict):
    """Samples, those of several prompts in the prompts' order. What was not asked for is null."""

    type: Literal["sample"]
    sequences: list[SampledSequence]
    prompt_logprobs: Numbers | None
    topk_prompt_logprobs: TokenLogprobs | None
    target_prompt_logprobs: PromptTensor | None
    prompt_alt_tokens: AlternativeTokens | None
    prompt_cache_hit_tokens: int
    base_model: NotRequired[str]
    parts: NotRequired[list[str]]


class SaveResult(TypedDict):
    """A checkpoint was saved, or, where `path` is null, weights to sample from that have no name."""

    type: Literal["save_weights", "save_weights_for_sampler", "save_weights_external"]
    model_id: str
    path: str | None
    name: NotRequired[str]
    checkpoint_path: NotRequired[str]
    tinker_path: NotRequired[str]
    xorl_path: NotRequired[str]
    model_path: NotRequired[str]
    sampling_session_id: NotRequired[str]
    router_address: NotRequired[str]
    size_bytes: NotRequired[int]


class LoadWeightsResult(TypedDict):
    """The checkpoint at `path` was loaded into the model."""

    type: Literal["load_weights"]
    path: str
    model_id: str


class Lora(TypedDict):
    """A model's adapter. Its product is scaled by alpha / rank."""

    rank: int
    alpha: float
    seed: int
    train_attn: bool
    train_mlp: bool
    train_unembed: bool


class NamedLora(Lora):
    """A checkpoint's adapter; `lora_rank` and `lora_alpha` are xorl's names for `rank` and `alpha`."""

    lora_rank: int
    lora_alpha: float


@with_config(ConfigDict(extra="allow"))
class Optimizer(TypedDict):
    """A model's optimizer: its family, and the options that it was created with."""

    type: str


class CreateModelResult(TypedDict):
    """The model is ready. `lora_config` is null if its full weights are trained."""

    type: Literal["create_model"]
    status: Literal["ready"]
    model_id: str
    base_model: str
    lora_config: Lora | None
    optimizer_config: Optimizer
    grad_normalization: GradNormalization
    target_alignment: TargetAlignment
    router_address: str
    warning_message: NotRequired[str]


class UnloadModelResult(TypedDict):
    type: Literal["unload_model"]
    model_id: str


class CreateCustomLossResult(TypedDict):
    """The uploaded loss can be named in forward_backward by `loss_id`."""

    type: Literal["create_custom_loss"]
    loss_id: str


class _SamplingSession(TypedDict):
    """Weights under an id to sample from. `lora_name` is what SGLang's `/generate` calls the adapter."""

    sampling_session_id: str
    model_path: str | None
    base_model: str
    lora_name: str
    message: str


class CreateSamplingClientResult(_SamplingSession):
    """The sampling client is ready; `sampling_client_id` is the id of its sampling session."""

    type: Literal["create_sampling_client"]
    status: Literal["ready"]
    sampling_client_id: str
    warning_message: NotRequired[str]


Result = (
    ForwardBackwardResult
    | OptimStepResult
    | AbortGradientEpochResult
    | SampleResult
    | SaveResult
    | LoadWeightsResult
    | CreateModelResult
    | UnloadModelResult
    | CreateCustomLossResult
    | CreateSamplingClientResult
)


@with_config(ConfigDict(extra="allow"))
class CompletedFuture(TypedDict):
    """The result, both under `result` and key by key beside it."""

    status: Literal["completed"]
    result: Result


Polled = Result | FailedFuture | ResultSize | PendingFuture
PolledByPath = CompletedFuture | FailedFuture | PendingFuture
Sampled = SampleResult | FailedFuture | Future


class SampleCompletion(TypedDict):
    state: Literal["finished", "failed"]
    request_id: str


class SampleCompletions(TypedDict):
    """Samples of a sampling session that were answered after `prev_cursor`. Go on from `cursor`."""

    completions: list[SampleCompletion]
    cursor: int


class CancelledFuture(TypedDict):
    """The cancellation was received. It takes effect if the request is a sample without an answer."""

    type: Literal["cancel_future"]


class CleanedFutures(TypedDict):
    cleaned_count: int
    futures_cleaned: int
    message: str


# Sessions.


class CreatedSession(TypedDict):
    type: Literal["create_session"]
    session_id: str
    info_message: str | None
    warning_message: str | None
    error_message: None


class SessionAlive(TypedDict):
    type: Literal["session_heartbeat"]
    session_id: str


class FinishedSession(TypedDict):
    type: Literal["finish_session"]


class SessionSummary(TypedDict):
    """A summary of the caller's models and sessions. `session_activity`: by model, the time of its last
    request in seconds since 1970. `loaded_training_adapters`: those that the engine has in memory."""

    registered_models: list[str]
    active_sessions: int
    session_activity: dict[str, float]
    idle_timeout_seconds: float
    loaded_training_adapters: list[str]
    loaded_sampling_adapters: dict[str, Any]
    max_training_adapters: int
    current_training_adapter: str | None


class SessionIds(TypedDict):
    sessions: list[str]


class SessionDetails(TypedDict):
    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None
    display_name: str | None


class ActiveState(TypedDict):
    type: Literal["active"]


class SessionEnd(TypedDict):
    type: Literal["success", "errored", "interrupted"]


class FinishedState(TypedDict):
    type: Literal["client_finished"]
    reason: SessionEnd
    detail: str | None


class FoundSession(TypedDict):
    """A session that a search found. `status` is null if its client fell silent without finishing it."""

    session_id: str
    created_at: str
    owner: str
    project_id: str
    status: ActiveState | FinishedState | None
    checkpoints_count: int
    checkpoint_storage_bytes: int
    display_name: str | None
    user_metadata: dict[str, str] | None


class NextPage(TypedDict):
    """The `cursor` to send for the next page."""

    last_created_at: str
    last_session_id: str


class FoundSessions(TypedDict):
    """One page of a search. `next_cursor` is null on the last."""

    sessions: list[FoundSession]
    next_cursor: NextPage | None


class TraceReady(TypedDict):
    """The trace is at `url`, which needs no key."""

    status: Literal["ready"]
    url: str


class TraceFailed(TypedDict):
    status: Literal["failed"]
    error: str


class TraceEvent(TypedDict):
    """An event of Chrome's Trace Event Format."""

    ph: Literal["M", "b", "e"]
    name: str
    pid: int
    tid: NotRequired[int]
    id: NotRequired[str]
    cat: NotRequired[str]
    ts: NotRequired[int]
    args: NotRequired[dict[str, Any]]


class Trace(TypedDict):
    """A session's operations in Chrome's Trace Event Format; times are microseconds since 1970."""

    displayTimeUnit: Literal["ms"]
    otherData: dict[str, str]
    traceEvents: list[TraceEvent]


# Models.


class DeletedModel(TypedDict):
    status: Literal["deleted"]
    model_id: str
    message: str
    resources_freed: list[str]


class KilledSession(TypedDict):
    """The model is unloaded. `checkpoint_path` is null if it was not saved."""

    success: Literal[True]
    message: str
    checkpoint_path: str | None


class ModelData(TypedDict):
    """A model as the Tinker SDK needs to know it. `lora_rank` is 0 if its full weights are trained."""

    arch: Literal["transformer"]
    model_name: str
    model_id: str
    lora_rank: int
    created_at: str
    tokenizer_id: NotRequired[str]


class RlveEnvironment(TypedDict):
    """The difficulty of one environment. `window`: the easiest and the hardest level that is drawn."""

    top: int
    highest: int
    samples: int
    right: int
    accuracy: float | None
    window: tuple[int, int]


class RlveProgress(TypedDict):
    """The progress of the server's own training of a model. `steps`: the metrics of the newest steps."""

    state: str
    message: str | None
    step: int
    num_rollout: int
    reward_mean: float | None
    accuracy: float | None
    environments: dict[str, RlveEnvironment]
    steps: list[dict[str, Any]]


class RlveModel(TypedDict):
    model_id: str
    rlve: RlveProgress


class ModelInfo(TypedDict):
    """A model. `rlve`: only if the server trains it itself."""

    type: Literal["get_info"]
    model_id: str
    model_name: str
    model_data: ModelData
    is_lora: bool
    lora_rank: NotRequired[int]
    lora_alpha: NotRequired[float]
    optimizer_config: Optimizer
    status: str
    rlve: NotRequired[RlveProgress]


@with_config(ConfigDict(extra="allow"))
class TokenizerFile(TypedDict):
    """The model's `tokenizer.json`, and beside its own keys what transformers says of the tokenizer."""

    tokenizer_type: str
    vocab_size: int
    model_max_length: int
    hf_checkpoint: str
    special_tokens: dict[str, Any]
    chat_template: Any
    pad_token_id: int | None
    eos_token_id: int | None
    bos_token_id: int | None


# Sampling sessions.


class CreatedSamplingSession(_SamplingSession):
    type: Literal["create_sampling_session"]
    success: Literal[True]


class CreatedSamplingClient(CreateSamplingClientResult):
    """The sampling client is ready; a poll of `request_id` answers the same."""

    request_id: str


class JoinedSamplingSession(TypedDict):
    """The number that a new copy of a sampling client gets, as `client_counter`."""

    type: Literal["join_sampling_session"]
    client_counter: int


class SamplerInfo(TypedDict):
    """Weights to sample from. `metrics`: how an SGLang server's log-probs compare with the engine's; null
    before any were compared."""

    sampler_id: str
    base_model: str
    model_path: str | None
    sampling_engine: SamplingEngine | None
    metrics: Metrics | None


# Checkpoints and training runs.


class Checkpoint(TypedDict):
    """A checkpoint. `path` is in the client's scheme, `tinker_path` always in Tinker's."""

    checkpoint_id: str
    checkpoint_type: str
    time: str
    created_at: str
    path: str
    tinker_path: str
    size_bytes: int | None
    public: bool
    user_metadata: dict[str, str] | None
    expires_at: str | None


class PageCursor(TypedDict):
    """The place of a page in the whole listing."""

    offset: int
    limit: int
    total_count: int


class Checkpoints(TypedDict):
    checkpoints: list[Checkpoint]


class CheckpointPage(Checkpoints):
    cursor: PageCursor


class DeletedCheckpoint(TypedDict):
    success: Literal[True]
    deleted_path: str
    error: None


class CheckpointInfo(TypedDict):
    """The properties of a model that can load the checkpoint. `lora_rank` is 0 for full weights."""

    exists: Literal[True]
    base_model: str
    is_lora: bool
    lora_rank: int
    lora_alpha: NotRequired[float]
    train_unembed: NotRequired[bool]
    train_mlp: NotRequired[bool]
    train_attn: NotRequired[bool]
    lora_config: NotRequired[NamedLora]
    optimizer_config: Optimizer | None
    created_at: str
    size_bytes: int | None


class NoCheckpoint(TypedDict):
    exists: Literal[False]


class CopiedWeights(TypedDict):
    tinker_path: str


class Acknowledged(TypedDict):
    status: Literal["accepted", "changed", "deleted", "published", "unpublished", "revoked"]


class FileUrls(TypedDict):
    """URLs by file name, which need no key until they expire."""

    urls: dict[str, str]
    expires: str


class ImportedWeights(TypedDict):
    """The adapter is a checkpoint to train on (`path`) and one to sample from (`sampler_path`)."""

    type: Literal["import_weights"]
    training_run_id: str
    base_model: str
    path: str
    sampler_path: str


class TrainingRun(TypedDict):
    """A training run, which may have ended. `corrupted`: it failed, and cannot be trained on."""

    training_run_id: str
    model_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    lora_rank: int | None
    corrupted: bool
    last_request_time: str
    last_checkpoint: Checkpoint | None
    last_sampler_checkpoint: Checkpoint | None
    user_metadata: dict[str, str] | None


class TrainingRuns(TypedDict):
    training_runs: list[TrainingRun]
    cursor: PageCursor


# What the console shows.


class MetricsPoint(TypedDict):
    """One step of a run. `complete`: its optim_step has been answered. `time`: seconds since 1970."""

    step: int
    time: float
    complete: bool
    metrics: dict[str, float]


class RunMetrics(TypedDict):
    """Steps of a run, oldest first, and the cursor to ask for later ones."""

    run_id: str
    points: list[MetricsPoint]
    cursor: str


class EngineHealth(TypedDict):
    """The engine process. `lives`: how often it was started."""

    phase: str
    text: str
    ready: bool
    lives: int


class QueuedModel(TypedDict):
    """A model of the caller, and how many of its operations wait for their answers."""

    id: str
    name: str
    waiting: int


class OverviewMemory(TypedDict):
    """Memory of each device: what the engine may use, what it holds by kind, and what the device has free."""

    capacity_bytes: int
    held_bytes: dict[str, int]
    free_bytes: int | None


class Compilations(TypedDict):
    """Programs that were compiled since the server's start, and those found in the cache of programs."""

    count: int
    from_cache: int
    seconds: float


class OverviewQueue(TypedDict):
    """Operations that wait: those of all tenants together, and the caller's."""

    all_tenants: int
    models: list[QueuedModel]
    samples: int


class Overview(TypedDict):
    """The server as the caller may see it. `revisions`: by model, a number that changes with each
    answer."""

    owner: str
    version: str
    engine: EngineHealth
    memory: OverviewMemory | None
    compilations: Compilations
    queue: OverviewQueue
    resident_models: list[str]
    disk: dict[str, int] | None
    revisions: dict[str, int]


class ConsoleRun(TypedDict):
    """A run, and the metrics of its newest step."""

    id: str
    name: str
    base_model: str
    lora_rank: int | None
    state: str
    session_id: str
    created_at: str | None
    last_request_at: str | None
    user_metadata: dict[str, str] | None
    step: int | None
    metrics: dict[str, float]


class ConsoleRuns(TypedDict):
    runs: list[ConsoleRun]
    total: int


class ConsoleSession(TypedDict):
    id: str
    name: str
    tags: list[str]
    user_metadata: dict[str, str] | None
    sdk_version: str | None
    project_id: str | None
    created_at: str | None
    last_heartbeat_at: str | None
    finished_at: str | None
    finish_reason: str | None


class ConsoleSessions(TypedDict):
    sessions: list[ConsoleSession]


class TenantUsage(TypedDict):
    """What a tenant has used: tokens, and the number of checkpoints saved."""

    tenant: str
    trained: int
    prefilled: int
    prefilled_cached: int
    sampled: int
    checkpoints: int


class TenantsUsage(TypedDict):
    """`all_tenants`: whether the caller sees all of them, or only its own."""

    all_tenants: bool
    tenants: list[TenantUsage]


class ConsoleSampler(TypedDict):
    """A sampling session. `follows`: the model whose newest inflight weights it samples."""

    id: str
    session_id: str
    base_model: str
    model_path: str | None
    follows: str | None
    created_at: str | None


class ConsoleSamplers(TypedDict):
    samplers: list[ConsoleSampler]


class DownloadUrl(TypedDict):
    """A URL that needs no key until it expires."""

    url: str
    expires: str | None


# The server itself.


class ClientConfig(TypedDict):
    """The parts of its protocol that the Tinker SDK uses with this server."""

    parallel_fwdbwd_chunks: bool
    proto_compress_fwdbwd: bool
    proto_write_fwdbwd: bool
    fwd_via_fwdbwd: bool
    create_model_via_load_weights: bool
    sample_use_retrieve_futures: bool
    sample_join_sampling_session: bool
    pjwt_auth_enabled: bool
    custom_loss_server_side: bool


class DynamicClientConfig(TypedDict):
    """Settings that the Tinker SDK asks for again after `refresh_interval_sec`."""

    refresh_interval_sec: int
    sample_cancel_enabled: bool
    sample_cancel_max_batch_size: int


class SupportedModel(TypedDict):
    model_name: str
    max_context_length: int
    trainable: bool
    sampleable: bool
    supports_lora: bool


class Capabilities(TypedDict):
    """The features of the server. `max_batch_size`: datums of one request, at most."""

    supported_models: list[SupportedModel]
    model_names: list[str]
    max_batch_size: int
    features: list[str]
    version: str


class Healthz(TypedDict):
    status: Literal["ok"]


class Directory(TypedDict):
    name: str
    version: str
    architecture: str
    docs: str
    health: str
    endpoints: dict[str, str]


class MemoryHealth(OverviewMemory):
    """The memory of each device, in bytes, as the engine reported it last. `planned` and `held`: by kind."""

    planned_bytes: dict[str, int]
    waiting_in_host_memory_bytes: int


class DiskHealth(TypedDict):
    """The data directory's file system. `full`: submits are answered 507. `used_bytes`: by kind."""

    total_bytes: int
    free_bytes: int
    reserve_bytes: int
    full: bool
    used_bytes: dict[str, int]


class DiskUnknown(TypedDict):
    error: str


class Health(TypedDict):
    """The state of the server and of its engine. `model_ids`: the caller's models, if a key was sent."""

    status: Literal["healthy", "unhealthy"]
    version: str
    timestamp: str
    engine_running: bool
    active_requests: int
    total_requests: int
    futures_count: int
    active_models: int
    active_training_clients: int
    active_sessions: int
    model_ids: list[str]
    ray_status: Literal["not_used"]
    ray_initialized: Literal[False]
    engine: EngineHealth
    memory: MemoryHealth | None
    disk: DiskHealth | DiskUnknown


class SleepState(TypedDict):
    """The bytes that the engine moved off its device or back, and the seconds that it took."""

    status: Literal["sleeping", "awake"]
    offload_time: NotRequired[float]
    load_time: NotRequired[float]
    execution_time: float
    bytes: int
    bytes_on_device: int


class SleepAnswer(TypedDict):
    success: Literal[True]
    result: SleepState


# Accounts and keys.


class AuditEntry(TypedDict):
    """One thing that the tenant did. Entries of checkpoints have the last three keys too."""

    timestamp: str
    event: str
    event_details: dict[str, Any]
    model_id: NotRequired[str | None]
    tinker_path: NotRequired[str | None]
    purpose: NotRequired[str | None]


class AuditLog(TypedDict):
    """A day's entries, oldest first."""

    entries: list[AuditEntry]


class UsageKind(TypedDict):
    type: Literal["training", "sampling_prefill", "sampling_sample", "checkpoint"]
    cached: NotRequired[bool]
    token_count: NotRequired[int]
    count: NotRequired[int]


class UsageEvent(TypedDict):
    """An hour's use of one kind, by base model, session and training run."""

    bucket_start: str
    bucket_end: str
    base_model: str
    user_id: str
    user_name: str
    session_id: str | None
    project_id: str | None
    training_run_id: str | None
    event_info: UsageKind


class UsageSession(TypedDict):
    user_metadata: dict[str, str] | None


class Usage(TypedDict):
    """The tenant's usage by the hour, with the sessions that it names by id."""

    data: list[UsageEvent]
    sessions: dict[str, UsageSession]


class StoredCheckpoints(TypedDict):
    project_id: str
    org_user_urn: str
    user_name: str
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float


class CheckpointStorage(TypedDict):
    """The tenant's checkpoints as they are now, by project."""

    data: list[StoredCheckpoints]


class Token(TypedDict):
    """A token, to be sent in place of the key."""

    jwt: str


class KeyOrganization(TypedDict):
    name: str


class KeyUser(TypedDict):
    """The user of a key. `email` is the tenant's name, because the server knows no e-mail addresses."""

    email: str


class KeyDetails(TypedDict):
    org_details: KeyOrganization
    user_details: KeyUser


class KeyInfo(TypedDict):
    """The caller's key. `name` is what `tinsmith keys revoke` takes."""

    key_id: int
    name: str
    note: str | None
    details: KeyDetails


# What clients of inference servers ask first.


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
    object: Literal["list"]
    data: list[ServedModel]


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
    """An inference server as it describes itself."""

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


class Outcome(TypedDict):
    success: bool
    message: str


class AddedEndpoint(Outcome):
    """The registration of a server; without `success`, `message` says why it was refused."""

    endpoint: InferenceEndpoint
    weights_synced: bool
    sync_message: str | None


class OperatorEndpoints(TypedDict):
    """The number of inference servers that the operator has named for every tenant."""

    count: int
    healthy: int


class InferenceEndpoints(TypedDict):
    """The caller's inference servers, and how many there are for every tenant."""

    endpoints: list[InferenceEndpoint]
    count: int
    of_operator: OperatorEndpoints


class SyncedEndpoint(Outcome):
    host: str
    port: int
    seconds: dict[str, float]


class SyncedWeights(Outcome):
    """The result of a sync. `success`: every server has the weights. Times are in seconds."""

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
