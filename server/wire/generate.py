"""SGLang's `/generate`: the body. Every field is honoured, or refused with an error that names it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

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

from ...engine import messages
from .body import (
    LIST,
    ONE,
    Finite,
    Int64,
    StrictBody,
    Unsupported,
    anything,
    as_json,
    empty,
    empty_or,
    no_biases,
    one_or_list,
    only,
)

MAX_PROMPTS = 256
_Strings = Annotated[str | list[str] | None, AfterValidator(as_json)]
_Rid = Annotated[str, Field(min_length=1, max_length=192)]
_TopCount = Annotated[StrictInt, Field(ge=0, le=messages.TOPK_LIMIT)]
_Start = Annotated[Int64, Field(ge=-1)]
_Token = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]
_Tokens = Annotated[list[_Token], Field(max_length=messages.TARGETS_LIMIT)]


class GenerateParams(StrictBody):
    """SGLang's `sampling_params`, and its defaults. `max_new_tokens` null is up to the model's context."""

    UNSUPPORTED: ClassVar[Unsupported] = {
        "min_new_tokens": only(0),
        "stop_regex": empty,
        "json_schema": empty,
        "regex": empty,
        "ebnf": empty,
        "structural_tag": empty,
        "beam_width": only(1),
        "spaces_between_special_tokens": only(True),
        "stream_interval": anything,  # a hint: how many tokens an event has
        "logit_bias": no_biases,
        "custom_params": empty,
        "watermark": empty_or(False),
    }
    NULLABLE: ClassVar[frozenset[str]] = frozenset({"max_new_tokens"})
    max_new_tokens: Annotated[Int64, Field(ge=0)] | None = 128
    temperature: Finite = Field(1.0, ge=0)
    top_p: Finite = Field(1.0, gt=0, le=1)
    top_k: Int64 = Field(-1, ge=-1, le=1 << 31)
    min_p: Finite = Field(0.0, ge=0, le=1)
    stop: _Strings = None
    stop_token_ids: list[Int64 | None] | None = None
    n: StrictInt = Field(1, ge=1)
    sampling_seed: StrictInt | None = None
    seed: StrictInt | None = None
    repetition_penalty: Finite = Field(1.0, ge=0.01, le=100)
    presence_penalty: Finite = Field(0.0, ge=-2, le=2)
    frequency_penalty: Finite = Field(0.0, ge=-2, le=2)
    ignore_eos: StrictBool = False
    skip_special_tokens: StrictBool = True
    no_stop_trim: StrictBool = False

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def message(self, end_tokens: list[int]) -> messages.SamplingParams:
        """`end_tokens`: the model's own, which `ignore_eos` switches off, as it does `stop_token_ids`."""
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
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )

    @property
    def untempered(self) -> bool:
        """Whether log-probs are those of the model's own distribution."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return self.temperature in (0.0, 1.0) and penalties == (1.0, 0.0, 0.0)


_Params = Annotated[
    Annotated[GenerateParams, Tag(ONE)] | Annotated[list[GenerateParams], Tag(LIST)],
    Discriminator(one_or_list),
]


@dataclass(frozen=True)
class OnePrompt:
    """What a body says about one of its prompts. `logprob_start_len` -1: no log-probs of the prompt."""

    prompt: str | list[int]
    params: GenerateParams
    return_logprob: bool
    logprob_start_len: int
    top_logprobs_num: int
    token_ids_logprob: list[int]
    model: str | None
    rid: str | None


class Generate(StrictBody):
    """One prompt or several, as `text` or `input_ids`. Whose samples: `lora_path`, or `model`. Of several
    prompts most fields may be lists, with an entry for each."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "input_ids": [1, 2, 3],
                    "sampling_params": {"max_new_tokens": 16, "temperature": 0.7},
                    "return_logprob": True,
                }
            ]
        },
    )
    UNSUPPORTED: ClassVar[Unsupported] = {
        # Labels and hints, which change no answer.
        "log_metrics": anything,
        "no_logs": anything,
        "custom_labels": anything,
        "conversation_id": anything,
        "routing_key": anything,
        "routed_experts_start_len": only(0),
        "session_id": only(),
        "session_params": empty,
        "input_embeds": empty,
        "image_data": empty,
        "video_data": empty,
        "audio_data": empty,
        "modalities": empty,
        "use_audio_in_video": only(False),
        "lora_id": only(),
        "custom_logit_processor": empty,
        "return_hidden_states": only(False),
        "return_routed_experts": only(False),
        "return_indexer_topk": only(False),
        "return_sampling_mask": only(False),
        "return_flat_raw_top_logprobs": only(False),
        "return_flat_raw_output_top_logprobs": only(False),
        "return_flat_raw_top_logprobs_b64": only(False),
        "return_entropy": only(False),
        "return_bytes": only(False),
        "background": only(False),
        "require_reasoning": only(False),
        "priority": only(),
        "extra_key": empty,
        "cache_salt": empty,
        "watermark": empty_or(False),
        "data_parallel_rank": only(),
        "routed_dp_rank": only(),
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
        """What the body says about each of its prompts."""
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
    """Whether `token_ids_logprob` has a list for each prompt."""
    return isinstance(wanted, list) and any(each is None or isinstance(each, list) for each in wanted)
