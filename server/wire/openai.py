"""The bodies and answers of OpenAI's `/v1/completions` and `/v1/chat/completions`.

Every field is honoured, or refused with an error that names it. Fields that only label a request (`user`,
`metadata`, ...) are accepted and not used.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, NotRequired

from pydantic import (
    AfterValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    Tag,
    model_validator,
)
from typing_extensions import TypedDict

from ...engine.messages import TOPK_LIMIT, SamplingParams
from . import (
    LIST,
    ONE,
    Finite,
    Int64,
    Penalties,
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
from .responses import Numbers

_Strings = Annotated[str | list[str] | None, AfterValidator(as_json)]
_Text = Annotated[str, AfterValidator(as_json)]
_COMPLETION_TOKENS = 16  # OpenAI's default
MAX_PROMPTS = 64


def _kind_of_prompt(value: Any) -> str:
    """Return the tag of a prompt's type, so that errors are about the type that was sent."""
    if not isinstance(value, (list, tuple)):
        return "<text>"
    first = value[0] if value else ""
    return "<texts>" if isinstance(first, str) else "<lists>" if isinstance(first, list) else "<tokens>"


_Prompts = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Tag("<texts>")]
    | Annotated[list[Int64], Tag("<tokens>")]
    | Annotated[list[list[Int64]], Tag("<lists>")],
    Discriminator(_kind_of_prompt),
]


class StreamOptions(StrictBody):
    UNSUPPORTED: ClassVar[Unsupported] = unsupported(
        only(False), "include_obfuscation continuous_usage_stats"
    )
    include_usage: StrictBool = False


class ResponseFormat(StrictBody):
    type: Literal["text"]


class _Completions(Penalties, StrictBody):
    """Fields of both kinds of completions. `top_k`, `min_p`, `repetition_penalty`, `stop_token_ids`,
    `ignore_eos`, `skip_special_tokens` and `no_stop_trim` are extensions, as SGLang has them."""

    # Hints, settings for what OpenAI's platform does after the answer, and options of SGLang and vLLM.
    UNSUPPORTED: ClassVar[Unsupported] = {
        "logit_bias": no_biases,
        "service_tier": only("auto", "default"),
        "prompt_cache_retention": only("in_memory", "in-memory"),
        "min_tokens": only(0),
        "length_penalty": only(1),
        "spaces_between_special_tokens": only(True),
        "priority": only(0),
        **unsupported(only(), "allowed_token_ids truncate_prompt_tokens"),
        **unsupported(empty, "metadata prompt_cache_options moderation bad_words stop_regex regex ebnf"),
        **unsupported(empty, "json_schema custom_params cache_salt extra_key"),
        **unsupported(only(False), "store use_beam_search early_stopping include_stop_str_in_output"),
        **unsupported(only(False), "return_hidden_states return_routed_experts return_token_ids"),
        **unsupported(only(False), "return_tokens_as_token_ids return_meta_info"),
    }
    model: str
    max_tokens: Annotated[Int64, Field(ge=1)] | None = None
    temperature: Finite = Field(1.0, ge=0, le=100)
    top_p: Finite = Field(1.0, ge=0, le=1)
    n: StrictInt = Field(1, ge=1)
    stop: _Strings = None
    seed: StrictInt | None = None
    stream: StrictBool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    top_k: Int64 = Field(-1, ge=-1, le=1 << 31)
    stop_token_ids: list[Int64] | None = None
    ignore_eos: StrictBool = False
    skip_special_tokens: StrictBool = True
    no_stop_trim: StrictBool = False

    @model_validator(mode="after")
    def _options(self) -> _Completions:
        if self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options: include_usage is for streams only; send stream too")
        return self

    @property
    def with_usage(self) -> bool:
        return self.stream_options.include_usage

    def params(self, end_tokens: list[int]) -> SamplingParams:
        """Return the engine's parameters. `end_tokens`: the model's own, which `ignore_eos` switches off
        together with `stop_token_ids`."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        greedy = self.top_p == 0.0  # only the most likely token is left
        return SamplingParams(
            max_tokens=self.max_tokens,
            seed=None if self.seed is None else self.seed % (1 << 64),
            stop_strings=[each for each in stop if each],
            stop_tokens=[] if self.ignore_eos else [*end_tokens, *(self.stop_token_ids or [])],
            temperature=self.temperature,
            top_k=1 if greedy else -1 if self.top_k == 0 else self.top_k,
            top_p=1.0 if greedy else self.top_p,
            **self.penalties(),
        )


class Completions(_Completions, json_schema_extra=example(model="tiny", prompt="Once upon", max_tokens=16)):
    """Asks for completions of `prompt`: a text, its tokens, or several of either. With `echo` each choice
    begins with its prompt; `max_tokens` may then be 0, which only scores it. Of `best_of` samples the `n` are
    returned whose tokens are the most likely on average."""

    UNSUPPORTED: ClassVar[Unsupported] = _Completions.UNSUPPORTED | {
        "suffix": empty,
        "logprobs": only(False),
        "response_format": only({"type": "text"}),
        "add_special_tokens": only(True),
        "prompt_logprobs": only(),
    }
    prompt: _Prompts
    max_tokens: Annotated[Int64, Field(ge=0)] = _COMPLETION_TOKENS
    logprobs: StrictInt | None = Field(None, ge=0, le=TOPK_LIMIT)
    echo: StrictBool = False
    best_of: StrictInt | None = Field(None, ge=1)

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = self.prompt
        several = isinstance(given, list) and (not given or isinstance(given[0], (str, list)))
        return given if several else [given]

    @property
    def num_samples(self) -> int:
        """The number of samples to draw of each prompt."""
        return self.n if self.best_of is None else self.best_of

    @model_validator(mode="after")
    def _number(self) -> Completions:
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise ValueError(f"prompt: send 1 to {MAX_PROMPTS}")
        if self.num_samples < self.n:
            raise ValueError(f"best_of: {self.best_of}; it must be at least n, which is {self.n}")
        if self.stream and self.num_samples > self.n:
            raise ValueError("best_of: the best are known only at the end; send stream false, or best_of n")
        return self


class Part(StrictBody):
    """Text, or a refusal of an earlier answer."""

    type: Literal["text", "refusal"]
    text: _Text | None = None
    refusal: _Text | None = None

    @property
    def content(self) -> str:
        return (self.text if self.type == "text" else self.refusal) or ""

    @model_validator(mode="after")
    def _filled(self) -> Part:
        if (self.text if self.type == "text" else self.refusal) is None:
            raise ValueError(f"{self.type}: Field required")
        return self


_Content = Annotated[
    Annotated[_Text, Tag(ONE)] | Annotated[list[Part], Tag(LIST)], Discriminator(one_or_list)
]


class Function(StrictBody):
    name: _Text
    arguments: _Text = "{}"


class ToolCall(StrictBody):
    UNSUPPORTED: ClassVar[Unsupported] = {"index": anything}  # of a stream's deltas
    id: _Text | None = None
    type: Literal["function"] = "function"
    function: Function

    def called(self) -> dict[str, Any]:
        """Return the tool call as chat templates take it: a JSON object in `arguments` is decoded."""
        try:
            arguments = json.loads(self.function.arguments)
        except ValueError:
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"type": "function", "function": function} | ({} if self.id is None else {"id": self.id})


class ChatMessage(StrictBody):
    """Any message that OpenAI's clients send, including an earlier answer's own."""

    # Fields that clients copy from an earlier answer.
    UNSUPPORTED: ClassVar[Unsupported] = {
        **unsupported(anything, "annotations logprobs"),
        **unsupported(empty, "audio function_call tool_calls"),
    }
    role: Annotated[_Text, Field(min_length=1, max_length=64)]
    content: _Content | None = None
    name: _Text | None = None
    refusal: _Text | None = None
    reasoning_content: _Text | None = None
    reasoning: _Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: _Text | None = None

    @model_validator(mode="after")
    def _filled(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError("content: Field required")
        return self

    def turn(self) -> dict[str, Any]:
        """Return the message as chat templates take it."""
        if isinstance(self.content, list):
            text = "".join(part.content for part in self.content)
        else:
            text = self.refusal or "" if self.content is None else self.content
        turn: dict[str, Any] = {"role": self.role, "content": text}
        if self.tool_calls:
            turn["tool_calls"] = [call.called() for call in self.tool_calls]
        others = {
            "name": self.name,
            "reasoning_content": self.reasoning_content or self.reasoning,
            "tool_call_id": self.tool_call_id,
        }
        return turn | {name: value for name, value in others.items() if value is not None}


class ChatCompletions(_Completions):
    """Asks for the next turn of a conversation. `chat_template_kwargs`, `add_generation_prompt` and
    `continue_final_message` are extensions, as SGLang and vLLM have them: variables of the model's chat
    template."""

    model_config = ConfigDict(
        json_schema_extra=example(
            model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=16
        )
    )
    UNSUPPORTED: ClassVar[Unsupported] = _Completions.UNSUPPORTED | {
        "modalities": empty_or(["text"]),
        "verbosity": only("medium"),
        "best_of": only(1),
        **unsupported(empty, "tools functions audio prediction documents"),
        **unsupported(only("none", "auto"), "tool_choice function_call"),
        **unsupported(only(True, False), "parallel_tool_calls stream_reasoning"),
        **unsupported(only(), "reasoning_effort web_search_options chat_template prompt_logprobs"),
        **unsupported(only(False), "add_special_tokens echo separate_reasoning"),
    }
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[Int64, Field(ge=1)] | None = None
    logprobs: StrictBool = False
    top_logprobs: StrictInt = Field(0, ge=0, le=TOPK_LIMIT)
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False

    @property
    def template_variables(self) -> dict[str, Any]:
        """The variables of the chat template besides the messages."""
        given = self.model_dump(
            include={"add_generation_prompt", "continue_final_message"}, exclude_unset=True
        )
        return given | (self.chat_template_kwargs or {})

    @model_validator(mode="before")
    @classmethod
    def _without_tools(cls, body: Any) -> Any:
        """Leave out tools that the model may not call."""
        if isinstance(body, dict):
            for choice, tools in (("tool_choice", "tools"), ("function_call", "functions")):
                if body.get(choice) == "none":
                    body = {name: value for name, value in body.items() if name != tools}
        return body

    @model_validator(mode="after")
    def _agree(self) -> ChatCompletions:
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError(
                    "max_completion_tokens: it means the same as max_tokens; send one of them, or equal ones"
                )
            self.max_tokens = self.max_completion_tokens
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs")
        return self


# OpenAI's completions. The log-prob of a token that nothing predicts is null.


class CachedTokens(TypedDict):
    cached_tokens: int


class TokenUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class WeightVersion(TypedDict):
    weight_version: str


class _Answer(TypedDict):
    id: str
    created: int
    model: str
    metadata: WeightVersion


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


class TextCompletion(_Answer):
    """Samples of one prompt or several, those of the first prompt first."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: TokenUsage


class TextCompletionChunk(_Answer):
    """One event of a stream. The last has no choices, and `usage`, if `include_usage` asks for it."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
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
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChatLogprobs | None


class ChatCompletion(_Answer):
    """Samples of the next turn of a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
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


class ChatCompletionChunk(_Answer):
    """One event of a stream. The last has no choices, and `usage`, if `include_usage` asks for it."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[TokenUsage | None]
