"""Bodies that ask for samples: of `asample` and `sample`, and of SGLang's `/generate`, with its answers.

Every field of `/generate` is honoured, or refused with an error that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NotRequired

import numpy as np
from pydantic import (
    AfterValidator,
    AliasChoices,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    Tag,
    model_validator,
)
from typing_extensions import TypedDict

from ...engine import messages
from ..dialect import DIALECT_RULES, Dialect
from ..errors import BadRequest, ContextTooLong
from . import (
    LIST,
    ONE,
    Body,
    Finite,
    Id,
    Int64,
    Integers,
    Penalties,
    SeqId,
    StrictBody,
    Unsupported,
    anything,
    as_json,
    empty,
    empty_or,
    example,
    no_biases,
    one_or_list,
    only,
    unsupported,
)
from .forward_backward import check_csr


class Chunk(Body):
    """A piece of a prompt. Without a `type` it is text, as tokens."""

    type: str = "encoded_text"
    tokens: Integers | None = None


class ModelInput(Body):
    chunks: list[Chunk] | None = None
    tokens: Integers | None = None
    input_ids: Integers | None = None

    def ids(self, where: str) -> np.ndarray:
        """Return the tokens as int64. Raises BadRequest naming the chunk and the field (`where`)."""
        given = [each for each in (self.chunks, self.tokens, self.input_ids) if each is not None]
        if len(given) > 1:
            raise BadRequest(f"{where}: chunks, tokens and input_ids are the same; send one of them")
        whole = self.input_ids if self.tokens is None else self.tokens
        if whole is not None:
            return whole
        pieces = [np.empty(0, np.int64)]
        for index, chunk in enumerate(self.chunks or []):
            if chunk.type != "encoded_text" or chunk.tokens is None:
                raise BadRequest(
                    f"{where}: chunk {index}: {chunk.type[:64]} is not supported here; send encoded_text"
                )
            pieces.append(chunk.tokens)
        return np.concatenate(pieces)


def longest_prompt(context: int, max_tokens: int | None) -> int:
    """Return the most tokens that a prompt may have: one fewer than the context, to leave room for a sample.
    A request for a single token may fill the context, because the SDK asks for a prompt's log-probs in this
    way."""
    return context if max_tokens == 1 else context - 1


def prompt_tokens(prompt: ModelInput, vocab_size: int, max_length: int, where: str = "prompt") -> bytes:
    """Return a prompt as int32 tokens. Raises BadRequest naming the chunk."""
    tokens = prompt.ids(where)
    if not len(tokens):
        raise BadRequest(f"{where}: no tokens; send at least one")
    if len(tokens) > max_length:
        raise ContextTooLong(f"{where}: {len(tokens)} tokens are over the model's limit of {max_length}")
    outside = (tokens < 0) | (tokens >= (vocab_size or 1 << 31))
    if outside.any():
        position = int(outside.argmax())
        raise BadRequest(
            f"{where}: token {tokens[position]} at position {position} is outside the vocabulary "
            f"[0, {vocab_size})"
        )
    return tokens.astype("<i4").tobytes()


class SamplingParams(Penalties):
    """Parameters of sampling. Fields that are left out have the defaults of the request's dialect."""

    model_config = ConfigDict(
        json_schema_extra=example(max_tokens=100, temperature=0.7, top_p=0.9, stop=["<|endoftext|>"])
    )
    max_tokens: Annotated[Int64, Field(ge=1)] | None = None
    seed: StrictInt | None = None
    stop: Annotated[str | list[Int64 | str] | None, AfterValidator(as_json)] = None
    stop_token_ids: list[Int64] | None = None
    temperature: Finite | None = Field(default=None, ge=0)
    top_k: Int64 | None = Field(default=None, ge=-1)
    top_p: Finite | None = Field(default=None, gt=0, le=1)

    def message(self, dialect: Dialect = "tinker", end_tokens: Sequence[int] = ()) -> messages.SamplingParams:
        """Return the engine's parameters. `end_tokens`: the model's own, to which the stops of some dialects
        add."""
        points = DIALECT_RULES[dialect]
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        stop_strings = [each for each in stop if isinstance(each, str)]
        stop_tokens = [each for each in stop if isinstance(each, int)] + (self.stop_token_ids or [])
        # An empty list stops at nothing; strings alone switch the model's own end tokens off.
        only_tokens = (self.stop is not None and not stop_strings) or self.stop_token_ids is not None
        if points.stops_add:
            stop_tokens = [*end_tokens, *stop_tokens]
        top_k = points.top_k if self.top_k is None else self.top_k
        return messages.SamplingParams(
            max_tokens=points.max_tokens if self.max_tokens is None else self.max_tokens,
            # Any integer is a seed; the engine's have 64 bits.
            seed=None if self.seed is None else self.seed % (1 << 64),
            stop_strings=stop_strings,
            stop_tokens=stop_tokens if stop_tokens or only_tokens else None,
            temperature=points.temperature if self.temperature is None else self.temperature,
            top_k=-1 if top_k == 0 else top_k,
            top_p=points.top_p if self.top_p is None else self.top_p,
            **self.penalties(),
        )


class TargetTokens(Body):
    """Tokens to score, int64 [prompt_len - 1, K]: dense or, with both kinds of indices, compressed sparse
    rows."""

    data: Integers
    dtype: Literal["int64"] = "int64"
    shape: tuple[Int64, Int64]
    sparse_crow_indices: Integers | None = None
    sparse_col_indices: Integers | None = None

    def message(self) -> messages.PromptCells:
        """Return the engine's message. Raises BadRequest if data, shape and indices do not agree."""
        where = "target_prompt_logprobs"
        rows, columns = self.shape
        outside = (self.data < -1) | (self.data >= 1 << 31)
        if outside.any():
            raise BadRequest(f"{where}: {self.data[outside][0]} is no token id, nor -1 for nothing")
        values = self.data.astype("<i4").tobytes()
        if self.sparse_crow_indices is None or self.sparse_col_indices is None:
            if self.sparse_crow_indices is not None or self.sparse_col_indices is not None:
                raise BadRequest(f"{where}: sparse_crow_indices and sparse_col_indices come together")
            if min(rows, columns) < 0 or rows * columns != len(self.data):
                raise BadRequest(f"{where}: shape {[rows, columns]} does not hold {len(self.data)} values")
            return messages.PromptCells((rows, columns), values)
        crow, cols = self.sparse_crow_indices, self.sparse_col_indices
        check_csr(len(self.data), (rows, columns), crow, cols, where)
        return messages.PromptCells((rows, columns), values, crow.tobytes(), cols.tobytes())


class SampleFields(Body):
    """Fields of every request for samples. The weights are those of a sampling session, of a sampler
    checkpoint (`model_path`), of a base model, or of a model as it is now (`model_id`, or
    `tinker://<model>/weights/live`)."""

    num_samples: StrictInt = Field(1, ge=1)
    sampling_params: SamplingParams = SamplingParams()
    sampling_session_id: Id | None = None
    seq_id: SeqId | None = None
    base_model: str | None = None
    model_path: str | None = None
    model_id: Id | None = None
    prompt_logprobs: StrictBool | None = Field(
        False, validation_alias=AliasChoices("prompt_logprobs", "include_prompt_logprobs")
    )
    topk_prompt_logprobs: StrictInt = Field(0, ge=0, le=messages.TOPK_LIMIT)
    topk_sample_logprobs: StrictInt = Field(0, ge=0, le=messages.TOPK_LIMIT)
    target_prompt_logprobs: TargetTokens | None = None
    prompt_alt_tokens_k: StrictInt | None = Field(0, ge=0, le=messages.ALTERNATIVES_LIMIT)
    prompt_logprobs_last_n: Int64 | None = Field(None, ge=1)
    # No SDK has this: each sequence of a JSON answer gets `routed_experts`, the experts of its tokens.
    record_routing: StrictBool = False


class Sample(SampleFields):
    model_config = ConfigDict(
        json_schema_extra=example(
            model_id="model-abc-123",
            prompt={"chunks": [{"tokens": [1, 2, 3]}]},
            num_samples=1,
            sampling_params={"max_tokens": 100, "temperature": 0.7, "top_p": 0.9, "stop": ["<|endoftext|>"]},
            include_prompt_logprobs=False,
        )
    )
    prompt: ModelInput


MAX_PROMPTS = 256


class SampleNow(SampleFields):
    """One `prompt`, whose samples are the answer, or several `prompts`, whose samples a poll returns. `wait`
    chooses otherwise."""

    prompt: ModelInput | None = None
    prompts: Annotated[list[Integers], Field(min_length=1, max_length=MAX_PROMPTS)] | None = None

    @model_validator(mode="after")
    def _either(self) -> SampleNow:
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("send prompt, or prompts")
        return self


class CreateSamplingSession(Body):
    """A sampling session in a session, or for a sampler checkpoint alone, whose `lora_name` SGLang's clients
    then know."""

    model_config = ConfigDict(
        json_schema_extra=example(
            session_id="session-abc-123",
            sampling_session_seq_id=0,
            base_model="Qwen/Qwen2.5-7B-Instruct",
            model_path=None,
        )
    )
    session_id: Id | None = None
    sampling_session_seq_id: SeqId | None = None
    base_model: str | None = None
    model_path: str | None = None
    model_id: Id | None = None
    # An extension: who draws its samples; left out, as its session's metadata, or the server, says.
    sampling_engine: messages.SamplingEngine | None = None


class CreateSamplingClient(CreateSamplingSession):
    sampling_params: SamplingParams | None = None


_Strings = Annotated[str | list[str] | None, AfterValidator(as_json)]
_Rid = Annotated[str, Field(min_length=1, max_length=192)]
_TopCount = Annotated[StrictInt, Field(ge=0, le=messages.TOPK_LIMIT)]
_Start = Annotated[Int64, Field(ge=-1)]
_Token = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]
_Tokens = Annotated[list[_Token], Field(max_length=messages.TARGETS_LIMIT)]


class GenerateParams(Penalties, StrictBody):
    """SGLang's `sampling_params` and its defaults. A `max_new_tokens` of null means up to the model's
    context."""

    UNSUPPORTED: ClassVar[Unsupported] = {
        "min_new_tokens": only(0),
        "beam_width": only(1),
        "spaces_between_special_tokens": only(True),
        "stream_interval": anything,  # a hint: how many tokens an event has
        "logit_bias": no_biases,
        "watermark": empty_or(False),
        **unsupported(empty, "stop_regex json_schema regex ebnf structural_tag custom_params"),
    }
    NULLABLE: ClassVar[frozenset[str]] = frozenset({"max_new_tokens"})
    max_new_tokens: Annotated[Int64, Field(ge=0)] | None = 128
    temperature: Finite = Field(1.0, ge=0)
    top_p: Finite = Field(1.0, gt=0, le=1)
    top_k: Int64 = Field(-1, ge=-1, le=1 << 31)
    stop: _Strings = None
    stop_token_ids: list[Int64 | None] | None = None
    n: StrictInt = Field(1, ge=1)
    sampling_seed: StrictInt | None = None
    seed: StrictInt | None = None
    ignore_eos: StrictBool = False
    skip_special_tokens: StrictBool = True
    no_stop_trim: StrictBool = False

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def message(self, end_tokens: list[int]) -> messages.SamplingParams:
        """Return the engine's parameters. `end_tokens`: the model's own, which `ignore_eos` switches off
        together with `stop_token_ids`."""
        seed = self.seed if self.sampling_seed is None else self.sampling_seed
        named = [token for token in self.stop_token_ids or [] if token is not None]
        return messages.SamplingParams(
            max_tokens=self.max_new_tokens,
            seed=None if seed is None else seed % (1 << 64),
            stop_strings=self.stop_strings,
            stop_tokens=[] if self.ignore_eos else [*end_tokens, *named],
            temperature=self.temperature,
            top_k=-1 if self.top_k == 0 else self.top_k,
            top_p=self.top_p,
            **self.penalties(),
        )

    @property
    def untempered(self) -> bool:
        """True if log-probs are those of the model's own distribution."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return self.temperature in (0.0, 1.0) and penalties == (1.0, 0.0, 0.0)


_Params = Annotated[
    Annotated[GenerateParams, Tag(ONE)] | Annotated[list[GenerateParams], Tag(LIST)],
    Discriminator(one_or_list),
]


@dataclass(frozen=True)
class OnePrompt:
    """The fields of a body for one of its prompts. A `logprob_start_len` of -1 means no log-probs of the
    prompt."""

    prompt: str | list[int]
    params: GenerateParams
    return_logprob: bool
    logprob_start_len: int
    top_logprobs_num: int
    token_ids_logprob: list[int]
    model: str | None
    rid: str | None


class Generate(StrictBody):
    """Asks for samples of one prompt or several, as `text` or `input_ids`, from the weights that `lora_path`
    or `model` names. With several prompts most fields may be lists, with an entry for each."""

    model_config = ConfigDict(
        json_schema_extra=example(
            input_ids=[1, 2, 3],
            sampling_params={"max_new_tokens": 16, "temperature": 0.7},
            return_logprob=True,
        )
    )
    UNSUPPORTED: ClassVar[Unsupported] = {
        # Labels and hints, which change no answer.
        **unsupported(anything, "log_metrics no_logs custom_labels conversation_id routing_key"),
        "routed_experts_start_len": only(0),
        "watermark": empty_or(False),
        **unsupported(only(), "session_id lora_id priority data_parallel_rank routed_dp_rank"),
        **unsupported(empty, "session_params input_embeds image_data video_data audio_data modalities"),
        **unsupported(empty, "custom_logit_processor extra_key cache_salt"),
        **unsupported(only(False), "use_audio_in_video return_hidden_states return_routed_experts"),
        **unsupported(only(False), "return_indexer_topk return_sampling_mask return_flat_raw_top_logprobs"),
        **unsupported(only(False), "return_flat_raw_output_top_logprobs return_flat_raw_top_logprobs_b64"),
        **unsupported(only(False), "return_entropy return_bytes background require_reasoning"),
    }
    text: str | list[str] | None = None
    input_ids: list[Int64] | list[list[Int64]] | None = None
    sampling_params: _Params = GenerateParams()
    return_logprob: StrictBool | list[StrictBool] = False
    logprob_start_len: _Start | list[_Start] = -1
    top_logprobs_num: _TopCount | list[_TopCount] = 0
    token_ids_logprob: _Token | _Tokens | list[_Tokens | None] | None = None
    return_text_in_logprobs: StrictBool = False
    return_prompt_token_ids: StrictBool = False
    stream: StrictBool = False
    lora_path: str | list[str | None] | None = None
    model: str | None = None
    rid: _Rid | list[_Rid] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Generate:
        if (self.text is None) == (self.input_ids is None):
            raise ValueError("send text, or input_ids")
        if self.lora_path is not None and self.model is not None:
            raise ValueError("lora_path and model say the same; send one of them")
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise ValueError(f"send 1 to {MAX_PROMPTS} prompts")
        count = len(self.prompts)
        lists = {name: getattr(self, name) for name in _LISTS}
        if _is_per_prompt(self.token_ids_logprob):
            lists["token_ids_logprob"] = self.token_ids_logprob
        for name, value in lists.items():
            if isinstance(value, list) and len(value) != count:
                raise ValueError(f"{name}: {len(value)} of them for {count} prompts; send one for each")
        if isinstance(self.rid, list) and len(set(self.rid)) < count:
            raise ValueError("rid: each prompt needs one of its own")
        if len({each.params.n for each in self.each}) > 1:
            raise ValueError("sampling_params: n has to be the same for all prompts")
        for each in self.each:
            if each.return_logprob and each.token_ids_logprob and not each.params.untempered:
                raise ValueError("token_ids_logprob: only with a temperature of 0 or 1 and without penalties")
        return self

    @property
    def is_batch(self) -> bool:
        given = self.text if self.input_ids is None else self.input_ids
        return isinstance(given, list) and (not given or isinstance(given[0], (str, list)))

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = self.text if self.input_ids is None else self.input_ids
        return given if self.is_batch else [given]

    @property
    def each(self) -> list[OnePrompt]:
        """The fields of the body for each of its prompts."""
        count = len(self.prompts)
        wanted: Any = self.token_ids_logprob
        if not _is_per_prompt(wanted):
            wanted = [[wanted] if isinstance(wanted, int) else wanted] * count
        if isinstance(self.rid, str) and self.is_batch:
            rids: list[str | None] = [f"{self.rid}_{place}" for place in range(count)]
        else:
            rids = _for_each(self.rid, count)
        return [
            OnePrompt(*fields)
            for fields in zip(
                self.prompts,
                _for_each(self.sampling_params, count),
                _for_each(self.return_logprob, count),
                _for_each(self.logprob_start_len, count),
                _for_each(self.top_logprobs_num, count),
                [each or [] for each in wanted],
                [each or self.model for each in _for_each(self.lora_path, count)],
                rids,
                strict=True,
            )
        ]


_LISTS = ("sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "lora_path", "rid")


def _for_each(value: Any, count: int) -> list[Any]:
    return value if isinstance(value, list) else [value] * count


def _is_per_prompt(wanted: Any) -> bool:
    """Return whether `token_ids_logprob` has a list for each prompt."""
    return isinstance(wanted, list) and any(each is None or isinstance(each, list) for each in wanted)


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
    """About one sample. `finish_reason` is null in a stream's events before the last. Keys with a log-prob in
    their names are there if `return_logprob` asks for them."""

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
