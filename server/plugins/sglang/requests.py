"""A sample as SGLang's `/generate` takes it, and why some are none that it serves as we do.

Its log-probs are of the tempered distribution before all filters, as ours; those of a prompt are asked for
greedily, which leaves them untempered.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ....ckpt.tokenizer_files import end_tokens, has_tokenizer
from ....engine import messages
from ...base_models import BaseModel
from ...text.tokenizer import of_folder
from ...wire.sampled import tokens_of
from .drawing import Drawing, Stops, likely, table
from .endpoint import EndpointRefused
from .limits import CUT_TOKENS, Limits

_GREEDY_BELOW = 1e-6  # a temperature: it then draws greedily, and says untempered log-probs


def why_not(sample: messages.Sample, model: BaseModel, limits: Limits | None, seeds: bool) -> str | None:
    """Names the field that such a server does not serve exactly as asked, or None. `limits` None: of one that
    is not known yet; `seeds`: whether it may draw with a seed, of which it makes other numbers than we."""
    params = sample.params
    greedy = params.temperature == 0.0
    if params.seed is not None and not (seeds and limits is not None and limits.deterministic):
        return "seed: an SGLang server draws with seeds only where it runs deterministic inference"
    if not greedy and params.temperature < _GREEDY_BELOW:
        return f"temperature: SGLang takes {params.temperature} for 0"
    if params.temperature not in (0.0, 1.0) and limits is not None and not limits.tempered:
        return "temperature: this SGLang server says log-probs of the untempered distribution"
    if (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0):
        return "repetition_penalty, presence_penalty, frequency_penalty: SGLang's are not the same"
    if not greedy and params.top_k == 1 and params.temperature != 1.0:
        return "top_k: 1 makes SGLang greedy, with other log-probs; send temperature 0"
    if not greedy and params.top_k > 0 and params.top_p < 1.0:
        return "top_k, top_p: together they keep other tokens there, where top_p is of what is not filtered"
    if params.seed is not None and params.min_p > 0.0:
        return "seed, min_p: together they would end an SGLang server"
    if sample.prompt_targets is not None:
        return "target_prompt_logprobs: SGLang scores the same tokens at all positions"
    if sample.prompt_alternatives:
        return "prompt_alt_tokens_k: SGLang draws nothing at a prompt's positions"
    last_n, length = sample.prompt_logprobs_last_n, len(sample.prompt) // 4
    if last_n is not None and not (sample.prompt_logprobs and 1 <= last_n < length):
        return (
            f"prompt_logprobs_last_n: {last_n}; it must be between 1 and the prompt's {length} tokens less "
            "one, with prompt_logprobs"
        )
    if len(sample.prompt) // 4 >= model.max_sequence_length:
        return "prompt: it fills the model's context, and SGLang draws nothing behind it"
    if limits is not None and (problem := _too_long(sample, model, limits)) is not None:
        return problem
    if any(params.stop_strings) and not has_tokenizer(model.folder):
        return "stop: this model has no tokenizer on the server; give stop token ids instead"
    return None


def _too_long(sample: messages.Sample, model: BaseModel, limits: Limits) -> str | None:
    """A sequence that may go on to the end of the model's context may end there `CUT_TOKENS` earlier."""
    longest, own = limits.longest, model.max_sequence_length
    prompt = len(sample.prompt) // 4
    wanted = prompt + _longest(sample, model)
    if limits.max_input is not None and prompt >= limits.max_input:
        return f"prompt: {prompt} tokens; the SGLang server takes fewer than {limits.max_input}"
    if longest is None or wanted <= longest or (wanted == own <= longest + CUT_TOKENS and prompt < longest):
        return None
    return f"max_tokens: {wanted} tokens with the prompt; the SGLang server takes {longest}"


def _longest(sample: messages.Sample, model: BaseModel) -> int:
    """How many tokens a sequence may have, as the embedded sampler has it."""
    room = model.max_sequence_length - len(sample.prompt) // 4
    return room if sample.params.max_tokens is None else min(sample.params.max_tokens, room)


def drawings(sample: messages.Sample, model: BaseModel, limits: Limits) -> list[Drawing]:
    """One for each of its sequences."""
    params, prompt = sample.params, tokens_of(sample.prompt)
    longest = _longest(sample, model)
    if limits.longest is not None:
        longest = min(longest, limits.longest - len(prompt))
    strings = tuple(string for string in params.stop_strings if string)
    stop_tokens = params.stop_tokens
    if stop_tokens is None:
        stop_tokens = [] if params.stop_strings else [*end_tokens(model.folder)]
    known = frozenset(token for token in stop_tokens if 0 <= token < model.vocab_size)
    decode = of_folder(model.folder).matched_text if strings else None
    stops = Stops(known, strings, longest, decode)
    return [Drawing(stops, prompt, sample.topk_sample_logprobs) for _ in range(sample.num_samples)]


def scores_prompt(sample: messages.Sample) -> bool:
    return sample.prompt_logprobs or sample.topk_prompt_logprobs > 0


def prompt_body(sample: messages.Sample, rid: str, lora: str | None) -> dict[str, Any]:
    """Draws nothing."""
    params = {"max_new_tokens": 0, "temperature": 0.0}
    return _body(tokens_of(sample.prompt), params, rid, lora) | {
        "logprob_start_len": 0,
        "top_logprobs_num": sample.topk_prompt_logprobs,
    }


def body(sample: messages.Sample, drawing: Drawing, rid: str, lora: str | None, seed: int | None) -> dict:
    """The tokens that the drawing does not have yet."""
    params, stops = sample.params, drawing.stops
    fields: dict[str, Any] = {
        "max_new_tokens": drawing.remaining,
        "temperature": params.temperature,
        "top_k": min(params.top_k, (1 << 31) - 1),  # which SGLang has in 32 bits
        "top_p": params.top_p,
        "min_p": params.min_p,
        "stop": list(stops.strings),
        "stop_token_ids": sorted(stops.tokens),
        # Without it the model's own ends it too; with it no token does.
        "ignore_eos": not stops.tokens,
        "skip_special_tokens": False,
    }
    if seed is not None:
        fields["sampling_seed"] = seed
    return _body(drawing.prompt + drawing.tokens, fields, rid, lora) | {
        "logprob_start_len": -1,
        "top_logprobs_num": drawing.topk,
    }


def _body(tokens: list[int], params: dict[str, Any], rid: str, lora: str | None) -> dict[str, Any]:
    named = {} if lora is None else {"lora_path": lora}
    return {"input_ids": tokens, "sampling_params": params, "rid": rid, "return_logprob": True} | named


def together(bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """As one request."""
    shared = {"return_logprob": True}
    return {key: [body[key] for body in bodies] for key in bodies[0] if key not in shared} | shared


def prompt_scores(sample: messages.Sample, answer: dict[str, Any]) -> dict[str, Any]:
    """The fields of `messages.SampleOutput`. Raises EndpointRefused."""
    prompt = tokens_of(sample.prompt)
    meta = answer.get("meta_info") or {}
    entries, tops = meta.get("input_token_logprobs") or [], meta.get("input_top_logprobs") or []
    if [entry[1] for entry in entries] != prompt or (
        sample.topk_prompt_logprobs and len(tops) != len(prompt)
    ):
        raise EndpointRefused("a prompt's tokens and its log-probs do not agree")
    first = 1 if sample.prompt_logprobs_last_n is None else len(prompt) - sample.prompt_logprobs_last_n
    logprobs = np.full(len(prompt), np.nan, "<f4")
    logprobs[first:] = [entry[0] for entry in entries[first:]]
    if not np.isfinite(logprobs[first:]).all():
        raise EndpointRefused("a log-prob of the prompt is not finite")
    found: dict[str, Any] = {}
    if sample.prompt_logprobs:
        found["prompt_logprobs"] = logprobs.tobytes()
    if k := sample.topk_prompt_logprobs:
        rows = [likely(row, k) if at >= first else [] for at, row in enumerate(tops)]
        found["topk_prompt_logprobs"] = table(rows, k)
    return found


def output(
    drawings: list[Drawing], answers: list[dict[str, Any]], scores: dict[str, Any]
) -> messages.SampleOutput:
    """`answers`: the first ones."""
    cached = [int((answer.get("meta_info") or {}).get("cached_tokens") or 0) for answer in answers]
    return messages.SampleOutput(
        [drawing.sequence() for drawing in drawings], prompt_cache_hit_tokens=max(cached, default=0), **scores
    )
