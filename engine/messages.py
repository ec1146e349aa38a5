"""Messages between the server process and the engine process.

The only module of the engine that most of the server imports: plain msgspec structs, no arrays, no jax.
Arrays travel as raw little-endian bytes with their dtype and shape. Directories are keys below the data
directory (`ckpt.paths`), chosen by the server, never by a client.

The server sends one stream of `ToEngine` messages. The engine answers each request exactly once, with `Done`
or `Failed`, and may send `Status`, `Memory`, `Measured` and `Beat` at any time. Operations of one model
arrive in seq_id order and take effect in the order of arrival.
"""

from __future__ import annotations

from typing import Literal

import msgspec

DType = Literal["float32", "int64", "int32"]


GradNormalization = Literal["sum", "token_mean"]
TargetAlignment = Literal["shifted", "by_shape"]
"""The form in which a datum of N tokens states what its positions predict.

`shifted`: inputs have N rows, position i predicts `target_tokens[i]`. `by_shape`: the same if the inputs have
that shape; or `target_tokens` of k < N rows are the last k of the tokens themselves, and all inputs and
log-probs are about these; or `labels` of N rows are about the tokens themselves, with -100 for none, and
there are N - 1 log-probs.
"""
LossValue = bool | float | str


class Tensor(msgspec.Struct, frozen=True, array_like=True):
    """A dense array: raw little-endian, row-major bytes."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes


class Datum(msgspec.Struct, frozen=True, array_like=True):
    """One training sequence.

    `tokens` is int32[N]. `inputs` are the loss function's per-token tensors, each of N rows; position i of
    the tokens predicts `target_tokens[i]`. Sparse client tensors are already dense here.

    For a model with `target_alignment` `by_shape` the inputs may have fewer rows, or other names: see
    `CreateModel`.
    """

    tokens: bytes
    inputs: dict[str, Tensor]


class LoraSpec(msgspec.Struct, frozen=True):
    """The adapter of a model: which matrices have one. Its product is scaled by alpha / rank."""

    rank: int
    alpha: float
    seed: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


class AdamParams(msgspec.Struct, frozen=True):
    """One AdamW step: decoupled weight decay, clipping by global norm (0 = off)."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class DimuonParams(msgspec.Struct, frozen=True):
    """One step of Muon, see `engine.dimuon`; clipping by global norm (0 or less = off)."""

    learning_rate: float
    beta1: float = 0.9
    grad_clip_norm: float = 0.0


class SamplingParams(msgspec.Struct, frozen=True):
    """Parameters of drawing tokens.

    `stop_tokens` None means the model's own end-of-sequence tokens; an empty list means none at all.
    `max_tokens` None means up to the model's context length. `temperature` 0 is greedy. `top_k` -1 is off.
    `min_p` removes tokens less than that fraction as likely as the most likely one; 0 is off.
    Penalties: `model.penalties`; 1, 0 and 0 are off.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop_strings: list[str] = []
    stop_tokens: list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


SamplingEngine = Literal["auto", "embedded", "sglang"]
"""Who draws samples: `embedded` is this engine, `sglang` an SGLang server, and `auto` an SGLang server if one
can draw exactly what was requested, otherwise this engine."""


class SamplerRef(msgspec.Struct, frozen=True):
    """The immutable weights of a sampler: a base model, and the adapter (or full weights) on top of it.

    `weights` is the directory key of a `SaveSampler`; None is the base model itself. `engine`: who may draw
    (None: the server's default), which only the server uses.
    """

    base_model: str
    weights: str | None = None
    engine: SamplingEngine | None = None


# --- operations -----------------------------------------------------------------------------------------


class _Request(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class CreateModel(_Request, frozen=True):
    """Create a model, or, with `checkpoint`, one that starts from a saved training state.

    `lora` None trains the full weights. `optimizer` is one of `optimizer_families`, `optimizer_options` are
    its options for all steps (`momentum`, ...). `optimizer_state` False takes only the checkpoint's weights.
    `grad_normalization`: a step uses the sum of the gradients, or divides it by the number of tokens with a
    weight since the last step.
    """

    model_id: str
    base_model: str
    lora: LoraSpec | None
    optimizer: str = "adamw"
    grad_normalization: GradNormalization = "sum"
    target_alignment: TargetAlignment = "shifted"
    optimizer_options: dict[str, LossValue] = {}
    checkpoint: str | None = None
    optimizer_state: bool = True


class CustomLoss(msgspec.Struct, frozen=True):
    """A loss that a client traced: its inputs' names and ranks, `logprobs` first, and the graph as JSON."""

    name: str
    inputs: list[tuple[str, int]]
    graph: bytes


class CheckCustomLoss(_Request, frozen=True):
    """Check whether `ForwardBackward`s may have that loss; answered with Nothing, or why not."""

    loss: CustomLoss


class ForwardBackward(_Request, frozen=True):
    """Compute losses and log-probs; unless `forward_only`, add gradients to the model's accumulator.

    `custom_loss` is that of loss_fn `custom`: it travels with the operation, because a replay has nothing
    else. `elementwise_loss`: also return the loss of each token, for all losses but custom ones. `owner`: the
    operation's owner; custom losses of different owners take turns.
    """

    model_id: str
    data: list[Datum]
    loss_fn: str
    loss_config: dict[str, LossValue] = {}
    forward_only: bool = False
    custom_loss: CustomLoss | None = None
    elementwise_loss: bool = False
    owner: str = ""


class OptimStep(_Request, frozen=True):
    """Take one optimizer step. `dimuon` replaces `params` for a model created with that optimizer."""

    model_id: str
    params: AdamParams = AdamParams()
    dimuon: DimuonParams | None = None


class DropGradients(_Request, frozen=True):
    """Drop the gradients accumulated by `ForwardBackward`s since the last step."""

    model_id: str


class SaveState(_Request, frozen=True):
    """Write the training state (weights, optimizer, accumulated gradients, step, configuration) into
    `directory`."""

    model_id: str
    directory: str


class LoadState(_Request, frozen=True):
    """Replace the model's weights, and with `optimizer_state` its optimizer, by those of `directory`."""

    model_id: str
    directory: str
    optimizer_state: bool


ExpertForm = Literal["shared", "per_expert", "target_parameters"]
"""The form in which files hold the adapters of experts, see `ckpt.expert_files`."""


class SaveSampler(_Request, frozen=True):
    """Save the current weights for sampling, into `directory` as PEFT (or merged, for full-weight models)
    safetensors.

    They are complete on disk before the answer; or, `deferred`, sampled from memory at once and written after
    the answer. A directory that a deferred save finds complete stays as it is: it is being replayed. A
    SaveState of the model is answered when all deferred saves before it are on disk.

    `urgent`: a deferred save is written at once, because an SGLang server will sample it. `merged` (not
    deferred): an adapter is written as full weights too, merged into its base model's. With `recipients` (not
    deferred) the files are encrypted to them. With `tokenizer` (not deferred) an adapter has its base model's
    tokenizer beside it. `experts` (not deferred) is the form in which the adapters of experts are written.
    Weights with one of these four are not sampled here.
    """

    model_id: str
    directory: str
    deferred: bool = False
    urgent: bool = False
    recipients: list[str] = []  # `ckpt.age`
    merged: bool = False
    tokenizer: bool = False
    experts: ExpertForm = "shared"


class Fp8(msgspec.Struct, frozen=True):
    """The way in which matrices become float8, see `ckpt.fp8`."""

    block: tuple[int, int] | None = (128, 128)
    kept: list[str] = []


class ExportWeights(_Request, frozen=True):
    """Write full weights into `directory` as a Hugging Face folder; answered with `SamplerSaved`.

    They are the base model's, or those of `weights` (the directory of a `SaveSampler` or a `SaveState`), with
    an adapter merged into its base model's. Without `merged` an adapter is written as PEFT reads it.
    """

    base_model: str
    weights: str | None
    directory: str
    fp8: Fp8 | None = None
    merged: bool = True


TOPK_LIMIT = 64  # most likely tokens that a request may ask for per position
TARGETS_LIMIT = 4096  # tokens to score per prompt position
ALTERNATIVES_LIMIT = 64  # tokens drawn per prompt position


class PromptCells(msgspec.Struct, frozen=True):
    """Values for cells of a [prompt_len - 1, K] table whose row i is about prompt position i + 1.

    Row-major, or, with int64 `crow_indices` and `col_indices`, the listed cells of compressed sparse rows.
    """

    shape: tuple[int, int]
    values: bytes  # int32 token ids asked for (-1: nothing), or float32 log-probs
    crow_indices: bytes | None = None
    col_indices: bytes | None = None


class PromptAlternatives(msgspec.Struct, frozen=True):
    """`k` tokens drawn for every prompt position after the first: int32 and float32 [prompt_len - 1, k].

    The log-probs are the model's, at temperature 1.
    """

    token_ids: bytes
    logprobs: bytes
    k: int


class Sample(_Request, frozen=True):
    """Draw sequences after a prompt.

    `prompt_logprobs_last_n` leaves all but the last n rows of `prompt_logprobs` and `topk_prompt_logprobs`
    empty. `prompt_targets` are tokens to score at prompt positions, `prompt_alternatives` how many to draw at
    each, by `temperature` alone. `stream`: `Drawn` messages report the tokens as they are drawn, before the
    answer, which has all of them. `record_routing`: each sequence has the experts of its tokens
    (`RoutedExperts`).
    """

    sampler: SamplerRef
    prompt: bytes  # int32[prompt_len]
    num_samples: int
    params: SamplingParams
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    prompt_targets: PromptCells | None = None
    prompt_alternatives: int = 0
    stream: bool = False
    record_routing: bool = False


class DeleteModel(_Request, frozen=True):
    """Drop a model's training state from the engine."""

    model_id: str


class Cancel(_Request, frozen=True):
    """Stop the work of another request; that one then fails with category `user`."""

    target: str


class ReleaseSampler(_Request, frozen=True):
    """Forget the weights of that directory, which nobody will sample again. The server removes the files."""

    weights: str


class Sleep(_Request, frozen=True):
    """Give up the device's memory, after finishing earlier requests. A later request wakes the engine."""


class WakeUp(_Request, frozen=True):
    """Take the device's memory back."""


class Stop(_Request, frozen=True):
    """Finish what is running and queued, write what is pending, answer, exit 0."""


ToEngine = (
    CreateModel
    | CheckCustomLoss
    | ForwardBackward
    | OptimStep
    | DropGradients
    | SaveState
    | LoadState
    | SaveSampler
    | ExportWeights
    | Sample
    | DeleteModel
    | Cancel
    | ReleaseSampler
    | Sleep
    | WakeUp
    | Stop
)

# --- answers --------------------------------------------------------------------------------------------


class ModelCreated(msgspec.Struct, frozen=True, tag=True):
    lora: LoraSpec | None
    step: int = 0


class ForwardBackwardOutput(msgspec.Struct, frozen=True, tag=True):
    """Per datum, in the client's order, float32 log-probs shaped like its `target_tokens`, and losses."""

    logprobs: list[Tensor]
    metrics: dict[str, float]
    elementwise_loss: list[Tensor] | None = None


class OptimStepOutput(msgspec.Struct, frozen=True, tag=True):
    metrics: dict[str, float]


class StateSaved(msgspec.Struct, frozen=True, tag=True):
    size_bytes: int


class StateLoaded(msgspec.Struct, frozen=True, tag=True):
    step: int


class SamplerSaved(msgspec.Struct, frozen=True, tag=True):
    size_bytes: int


ROUTING_LIMIT = 1 << 26  # bytes of `RoutedExperts` that one request may ask for


class RoutedExperts(msgspec.Struct, frozen=True):
    """The experts of tokens in all layers with experts, [tokens, layers, experts of a token], most probable
    first. The last token of a sequence has none, because nothing was computed from it."""

    data: bytes
    dtype: Literal["uint8", "uint16"]
    shape: tuple[int, int, int]


class SampledSequence(msgspec.Struct, frozen=True):
    """Tokens int32[n] with the completing stop included, and float32[n] log-probs of the distribution after
    penalties and temperature, before all filters. `topk` is of that one too (see `TopK`)."""

    tokens: bytes
    logprobs: bytes
    stop_reason: Literal["stop", "length"]
    topk: TopK | None = None
    experts: RoutedExperts | None = None


EMPTY_LOGPROB = -99999.0  # the value of an empty cell of a top-k table


class TopK(msgspec.Struct, frozen=True):
    """The k most likely tokens per row: int32 and float32 [length, k]; an empty cell is
    (0, `EMPTY_LOGPROB`)."""

    token_ids: bytes
    logprobs: bytes
    k: int
    length: int


class SampleOutput(msgspec.Struct, frozen=True, tag=True):
    sequences: list[SampledSequence]
    prompt_logprobs: bytes | None = None  # float32[prompt_len], NaN at 0
    topk_prompt_logprobs: TopK | None = None
    prompt_cache_hit_tokens: int = 0
    prompt_targets: PromptCells | None = None  # laid out as in the request, 0.0 where it had -1
    prompt_alternatives: PromptAlternatives | None = None


class Slept(msgspec.Struct, frozen=True, tag=True):
    """The bytes that left the device or came back (0 if none had to), and what is on it now."""

    bytes: int
    seconds: float
    bytes_on_device: int = 0


class Nothing(msgspec.Struct, frozen=True, tag=True):
    """The answer to a request that has no result."""


Output = (
    ModelCreated
    | ForwardBackwardOutput
    | OptimStepOutput
    | StateSaved
    | StateLoaded
    | SamplerSaved
    | SampleOutput
    | Slept
    | Nothing
)


class Done(msgspec.Struct, frozen=True, tag=True):
    """`device_seconds` is the time the request held the accelerator."""

    request_id: str
    output: Output
    device_seconds: float = 0.0


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A request failed.

    `user`: the request was wrong, and the message says how. `server`: an internal error, with an id that
    finds it in the log. `missing`: a Sample of weights that this engine does not have; replaying their model
    may make them.
    """

    request_id: str
    message: str
    category: Literal["user", "server", "missing"]
    device_seconds: float = 0.0


class Drawn(msgspec.Struct, frozen=True, tag=True):
    """Tokens of one sequence of a Sample, int32[n], and their float32[n] log-probs, from position `begin` on.

    An engine that starts a request again reports from 0 again, with the same tokens if the request has a
    seed.
    """

    request_id: str
    index: int
    begin: int
    tokens: bytes
    logprobs: bytes
    topk: TopK | None = None


class Status(msgspec.Struct, frozen=True, tag=True):
    """The state of the engine, for logs and health: loading, compiling, ready, stopping."""

    phase: Literal["loading", "compiling", "ready", "stopping"]
    text: str


class Beat(msgspec.Struct, frozen=True, tag=True):
    """A sign of life, whatever the engine computes; sent every `EngineConfig.beat_seconds`."""


class Memory(msgspec.Struct, frozen=True, tag=True):
    """The memory of each device, in bytes: what the engine may use, how that was `planned`, and what is
    `held`, by kind.

    `free` is what the first device reports (None: unknown), or on a CPU the machine. `waiting` is what states
    of models in training take in the host's memory.
    """

    capacity: int
    planned: dict[str, int]
    held: dict[str, int]
    free: int | None
    waiting: int


class Measured(msgspec.Struct, frozen=True, tag=True):
    """Counters since the engine's start, and gauges: `NAME` or `NAME/LABEL`."""

    counters: dict[str, float]
    gauges: dict[str, float]


FromEngine = Done | Failed | Drawn | Status | Beat | Memory | Measured

# --- start ----------------------------------------------------------------------------------------------


class BaseModel(msgspec.Struct, frozen=True):
    """A base model: its name for clients, and the Hugging Face folder it is loaded from.

    `digest`, if given, is that of the folder as the server found it (`model.folder.digest`). `reference` is
    what adapters' configs call the model, so that transformers can load it; empty: the name.
    """

    name: str
    path: str
    digest: str | None = None
    reference: str = ""


class Devices(msgspec.Struct, frozen=True):
    """The devices that JAX finds on this machine. `bytes_each`: free memory of one; None: unknown."""

    platform: str
    count: int
    bytes_each: int | None = None


class EngineConfig(msgspec.Struct, frozen=True):
    """The engine's configuration, sent as JSON on its standard input."""

    address: str  # ZeroMQ endpoint that the server has bound
    data_dir: str
    cache_dir: str
    base_models: list[BaseModel]
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    mesh: dict[str, int] = {}  # data, fsdp, tensor; empty: one device
    max_rank: int = 128
    full_weight: bool = False
    max_sequence_length: int | None = None  # None: the model's own limit
    kv_cache_tokens: int | None = None  # None: derived from the device
    sampler_bytes: int | None = None  # bytes of sampler weights on the device; None: derived from it
    sampler_idle_seconds: float = 600.0  # unused sampler weights leave the device after this time
    log_level: str = "info"
    log_format: Literal["text", "json"] = "text"
    beat_seconds: float = 5.0
    under_way: str | None = None  # a file for the ids of running operations, `id TAB model LF ... NUL`


_to_engine_encoder = msgspec.msgpack.Encoder()
_to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
_from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    return _to_engine_encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    return _to_engine_decoder.decode(data)


def decode_from_engine(data: bytes) -> FromEngine:
    return _from_engine_decoder.decode(data)
