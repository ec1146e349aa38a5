"""Bodies that ask for samples.

Tokens as JSON bodies spell them: `chunks`, `tokens` or `input_ids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, AliasChoices, ConfigDict, Field, StrictBool, StrictInt, model_validator

from ...engine import messages
from ..dialect import POINTS, Dialect
from ..errors import BadRequest, ContextTooLong
from .body import Body, Finite, Id, Int64, Integers, SeqId, as_json
from .forward_backward import check_csr


class Chunk(Body):
    """Without a `type` it is text, as tokens."""

    type: str = "encoded_text"
    tokens: Integers | None = None


class ModelInput(Body):
    chunks: list[Chunk] | None = None
    tokens: Integers | None = None
    input_ids: Integers | None = None

    def ids(self, where: str) -> np.ndarray:
        """Return int64 tokens. Raises BadRequest naming the chunk, and `where` it is."""
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
    """The most tokens a prompt may have: one fewer than the context, as room for a sample. A request for
    a single token may fill the context, because the SDK asks so for a prompt's log-probs."""
    return context if max_tokens == 1 else context - 1


def prompt_tokens(prompt: ModelInput, vocab_size: int, max_length: int, where: str = "prompt") -> bytes:
    """int32 tokens. Raises BadRequest naming the chunk."""
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


class SamplingParams(Body):
    """What is left out has the default of the request's dialect."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"max_tokens": 100, "temperature": 0.7, "top_p": 0.9, "stop": ["<|endoftext|>"]}]
        }
    )
    max_tokens: Annotated[Int64, Field(ge=1)] | None = None
    seed: StrictInt | None = None
    stop: Annotated[str | list[Int64 | str] | None, AfterValidator(as_json)] = None
    stop_token_ids: list[Int64] | None = None
    temperature: Finite | None = Field(default=None, ge=0)
    top_k: Int64 | None = Field(default=None, ge=-1)
    top_p: Finite | None = Field(default=None, gt=0, le=1)
    # What follows no SDK has: extensions for plain HTTP.
    min_p: Finite = Field(default=0.0, ge=0, le=1)
    repetition_penalty: Finite = Field(default=1.0, ge=0.01, le=100)
    presence_penalty: Finite = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: Finite = Field(default=0.0, ge=-2, le=2)

    def message(self, dialect: Dialect = "tinker", end_tokens: Sequence[int] = ()) -> messages.SamplingParams:
        """As the engine takes them. `end_tokens` are the model's own; some dialects' stops add to them."""
        points = POINTS[dialect]
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
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )


class TargetTokens(Body):
    """int64 [prompt_len - 1, K], dense or, with both kinds of indices, compressed sparse rows."""

    data: Integers
    dtype: Literal["int64"] = "int64"
    shape: tuple[Int64, Int64]
    sparse_crow_indices: Integers | None = None
    sparse_col_indices: Integers | None = None

    def message(self) -> messages.PromptCells:
        """Raises BadRequest where data, shape and indices do not agree."""
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
    """Whose weights: those of a sampling session, of a sampler checkpoint (`model_path`), of a base model, or
    of a model as it is now (`model_id`, or `tinker://<model>/weights/live`)."""

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


class Sample(SampleFields):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model_id": "model-abc-123",
                    "prompt": {"chunks": [{"tokens": [1, 2, 3]}]},
                    "num_samples": 1,
                    "sampling_params": {
                        "max_tokens": 100,
                        "temperature": 0.7,
                        "top_p": 0.9,
                        "stop": ["<|endoftext|>"],
                    },
                    "include_prompt_logprobs": False,
                }
            ]
        }
    )
    prompt: ModelInput


MAX_PROMPTS = 256


class SampleNow(SampleFields):
    """One `prompt`, whose samples are the answer; or `prompts`, whose samples a poll gives. `wait` says
    otherwise."""

    prompt: ModelInput | None = None
    prompts: Annotated[list[Integers], Field(min_length=1, max_length=MAX_PROMPTS)] | None = None

    @model_validator(mode="after")
    def _either(self) -> SampleNow:
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("send prompt, or prompts")
        return self


class CreateSamplingSession(Body):
    """Of a session; or of a sampler checkpoint alone, whose name engines then know (`lora_name`)."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "session_id": "session-abc-123",
                    "sampling_session_seq_id": 0,
                    "base_model": "Qwen/Qwen2.5-7B-Instruct",
                    "model_path": None,
                }
            ]
        }
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
