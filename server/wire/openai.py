"""The bodies of OpenAI's `/v1/completions` and `/v1/chat/completions`.

What a body may say is what is done; any other field is refused by its name, but for those that only label a
request (`user`, `metadata`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, StrictInt, model_validator

from ...engine.messages import TOPK_LIMIT, SamplingParams
from ..errors import BadRequest
from .body import Body, Finite, Int64, as_json

_Strings = Annotated[str | list[str] | None, AfterValidator(as_json)]
MAX_PROMPTS = 64


class StreamOptions(Body):
    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool = False


class ResponseFormat(Body):
    type: Literal["text"]


class _Completions(Body):
    """`top_k`, `min_p`, `repetition_penalty` and `stop_token_ids` are extensions, as SGLang and vLLM have."""

    model_config = ConfigDict(extra="forbid")
    model: str
    max_tokens: Annotated[Int64, Field(ge=1)] | None = None
    temperature: Finite | None = Field(1.0, ge=0, le=100)
    top_p: Finite | None = Field(1.0, gt=0, le=1)
    n: StrictInt | None = Field(1, ge=1)
    stop: _Strings = None
    seed: StrictInt | None = None
    presence_penalty: Finite | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(0.0, ge=-2, le=2)
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    top_k: Int64 = Field(-1, ge=-1, le=1 << 31)
    min_p: Finite = Field(0.0, ge=0, le=1)
    repetition_penalty: Finite = Field(1.0, ge=0.01, le=100)
    stop_token_ids: list[Int64] | None = None

    @model_validator(mode="after")
    def _options(self) -> _Completions:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream")
        return self

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def params(self, end_tokens: list[int], default_max_tokens: int | None) -> SamplingParams:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=default_max_tokens if self.max_tokens is None else self.max_tokens,
            seed=None if self.seed is None else self.seed % (1 << 64),
            stop_strings=[each for each in stop if each],
            stop_tokens=[*end_tokens, *(self.stop_token_ids or [])],
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=-1 if self.top_k == 0 else self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
        )


class Completions(_Completions):
    """`prompt`: a text, its tokens, or several of either."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"model": "tiny", "prompt": "Once upon", "max_tokens": 16}]},
    )
    prompt: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    logprobs: StrictInt | None = Field(None, ge=0, le=TOPK_LIMIT)

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = self.prompt
        several = isinstance(given, list) and (not given or isinstance(given[0], (str, list)))
        return given if several else [given]

    @model_validator(mode="after")
    def _number(self) -> Completions:
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise ValueError(f"prompt: send 1 to {MAX_PROMPTS}")
        return self


class Part(Body):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: Annotated[str, AfterValidator(as_json)]


class ChatMessage(Body):
    model_config = ConfigDict(extra="forbid")
    role: Annotated[str, Field(min_length=1, max_length=64), AfterValidator(as_json)]
    content: Annotated[str, AfterValidator(as_json)] | list[Part]
    name: str | None = None

    def turn(self) -> dict[str, str]:
        """As chat templates take it."""
        if self.name is not None:
            raise BadRequest("messages: name: chat templates have no place for it")
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": self.role, "content": text}


class ChatCompletions(_Completions):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}
            ]
        },
    )
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[Int64, Field(ge=1)] | None = None
    logprobs: StrictBool | None = False
    top_logprobs: StrictInt | None = Field(None, ge=0, le=TOPK_LIMIT)
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _agree(self) -> ChatCompletions:
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens and max_completion_tokens are the same; send one of them")
            self.max_tokens = self.max_completion_tokens
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs")
        return self
