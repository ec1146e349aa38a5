"""SGLang's `/generate`: the body, and the answer's shape."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, StrictInt, model_validator

from ...engine import messages
from .body import Body, Finite, Int64, as_json
from .sampled import likely_of, logprobs_of, tokens_of

MAX_PROMPTS = 256
_Strings = Annotated[str | list[str] | None, AfterValidator(as_json)]


class GenerateParams(Body):
    """SGLang's `sampling_params`, and its defaults. What is not here is refused."""

    model_config = ConfigDict(extra="forbid")
    max_new_tokens: Annotated[Int64, Field(ge=1)] | None = 128
    temperature: Finite = Field(1.0, ge=0)
    top_p: Finite = Field(1.0, gt=0, le=1)
    top_k: Int64 = Field(-1, ge=-1, le=1 << 31)
    min_p: Finite = Field(0.0, ge=0, le=1)
    stop: _Strings = None
    stop_token_ids: list[Int64] | None = None
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
        return messages.SamplingParams(
            max_tokens=self.max_new_tokens,
            seed=None if seed is None else seed % (1 << 64),
            stop_strings=self.stop_strings,
            stop_tokens=[] if self.ignore_eos else [*end_tokens, *(self.stop_token_ids or [])],
            temperature=self.temperature,
            top_k=-1 if self.top_k == 0 else self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )


class Generate(Body):
    """One prompt or several, as `text` or `input_ids`. Whose samples: `lora_path`, or `model`."""

    model_config = ConfigDict(
        extra="forbid",
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
    text: str | list[str] | None = None
    input_ids: list[Int64] | list[list[Int64]] | None = None
    sampling_params: GenerateParams = GenerateParams()
    return_logprob: StrictBool = False
    logprob_start_len: Int64 = -1
    top_logprobs_num: StrictInt = Field(0, ge=0, le=messages.TOPK_LIMIT)
    return_text_in_logprobs: StrictBool = False
    stream: StrictBool = False
    lora_path: str | None = None
    model: str | None = None
    rid: str | None = Field(None, max_length=192)
    return_routed_experts: StrictBool = False

    @model_validator(mode="after")
    def _whole(self) -> Generate:
        if (self.text is None) == (self.input_ids is None):
            raise ValueError("send text, or input_ids")
        if self.lora_path is not None and self.model is not None:
            raise ValueError("lora_path and model say the same; send one of them")
        if self.return_routed_experts:
            raise ValueError("return_routed_experts: this server's models have no experts")
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise ValueError(f"send 1 to {MAX_PROMPTS} prompts")
        if self.stream and (self.is_batch or self.sampling_params.n > 1):
            raise ValueError("stream: send one prompt, and n of 1")
        return self

    @property
    def is_batch(self) -> bool:
        given = self.text if self.input_ids is None else self.input_ids
        return isinstance(given, list) and (not given or isinstance(given[0], (str, list)))

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = self.text if self.input_ids is None else self.input_ids
        return given if self.is_batch else [given]


def logprob_entries(
    tokens: list[int], logprobs: list[float | None], texts: list[str] | None
) -> list[list[Any]]:
    """[[log-prob, token, its text or null], ...]"""
    written: list[str | None] = [*texts] if texts is not None else [None] * len(tokens)
    return [list(entry) for entry in zip(logprobs, tokens, written, strict=True)]


def prompt_logprobs(output: messages.SampleOutput) -> list[float | None]:
    """Of each token of the prompt; the first has none."""
    values: list[float | None] = [*logprobs_of(output.prompt_logprobs or b"")]
    return [None, *values[1:]]


def top_entries(sequence: messages.SampledSequence) -> list[list[list[Any]]]:
    return [[[logprob, token, None] for token, logprob in row] for row in likely_of(sequence.topk)]


def sampled(sequence: messages.SampledSequence) -> tuple[list[int], list[float | None]]:
    return tokens_of(sequence.tokens), [*logprobs_of(sequence.logprobs)]
