"""What an SGLang server can do, as it says itself, and whether it has the base model that it is to sample."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base_models import BaseModel
from .endpoint import Endpoint, EndpointSilent

CUT_TOKENS = 2
"""By so many it ends a sequence before its context, or its pages of keys and values, are full."""
_MOST_CHARACTERS, _MOST_TARGETS = 1024, 256  # of what is remembered
_MORE_THAN_INPUT = 6  # tokens are in the context of 0.5.23 than it says in `max_req_input_len`
# Of config.json: what makes another model of it.
_ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Limits:
    """`context_length`: tokens of a sequence, its prompt included; `max_input`: prompts have fewer than that.
    None: it has no limit, or does not say."""

    model_path: str
    served_name: str
    context_length: int | None
    max_input: int | None
    max_total_tokens: int | None
    enable_lora: bool
    max_lora_rank: int | None
    max_loaded_loras: int | None
    max_loras_per_batch: int | None
    lora_target_modules: tuple[str, ...] | None
    quantization: str | None
    dtype: str
    tp_size: int
    deterministic: bool
    version: str
    tempered: bool = True  # its log-probs are those of the tempered distribution

    @property
    def longest(self) -> int | None:
        """The tokens of a sequence that it is sure not to cut short."""
        known = [each for each in (self.context_length, self.max_total_tokens) if each is not None]
        return min(known) - CUT_TOKENS if known else None


def limits_of(server_info: dict[str, Any], model_info: dict[str, Any]) -> Limits:
    """Raises TypeError or ValueError for what no SGLang says. A server of our own kind says no number of
    tokens; one that asked itself, by whatever name, would never end."""
    if "max_total_num_tokens" not in server_info:
        raise ValueError("it says no max_total_num_tokens")
    said = server_info
    targets, max_input = said.get("lora_target_modules"), _number(said, "max_req_input_len")
    return Limits(
        model_path=_text(model_info.get("model_path") or said.get("model_path")),
        served_name=_text(said.get("served_model_name")),
        context_length=_number(said, "context_length") or (max_input and max_input + _MORE_THAN_INPUT),
        max_input=max_input,
        max_total_tokens=_number(said, "max_total_num_tokens"),
        enable_lora=bool(said.get("enable_lora")),
        max_lora_rank=_number(said, "max_lora_rank"),
        max_loaded_loras=_number(said, "max_loaded_loras"),
        max_loras_per_batch=_number(said, "max_loras_per_batch"),
        lora_target_modules=None if targets is None else tuple(map(_text, targets[:_MOST_TARGETS])),
        quantization=None if said.get("quantization") is None else _text(said["quantization"]),
        dtype=_text(said.get("dtype")),
        tp_size=_number(said, "tp_size") or 1,
        deterministic=bool(said.get("enable_deterministic_inference")),
        version=_text(said.get("version")),
    )


_PROBE_SECONDS = 60.0


async def are_tempered(client: Endpoint) -> bool:
    """Whether its log-probs are of the tempered distribution. That is SGLang's default, which the environment
    that it was started in may change; it does not say so, but at temperature 0.5 differences of log-probs are
    twice those at 1. Raises EndpointError."""
    spreads = []
    for temperature in (1.0, 0.5):
        params = {"max_new_tokens": 1, "temperature": temperature, "ignore_eos": True}
        body = {"input_ids": [0], "sampling_params": params, "return_logprob": True, "top_logprobs_num": 8}
        try:
            (answer,) = await asyncio.wait_for(client.generate(body), _PROBE_SECONDS)
        except TimeoutError:
            raise EndpointSilent(f"{client.url} draws no token") from None
        row = answer["meta_info"]["output_top_logprobs"][0]
        spreads.append(row[0][0] - row[-1][0])
    raw, other = spreads
    return abs(other - 2 * raw) < abs(other - raw)


def _text(value: Any) -> str:
    """What a server says in a few words; what is longer is cut."""
    return str(value or "")[:_MOST_CHARACTERS]


def _number(said: dict[str, Any], name: str) -> int | None:
    return None if said.get(name) is None else int(said[name])


def base_model_of(limits: Limits, base_models: Iterable[BaseModel]) -> str | None:
    """The one that it says it has: by folder, hub id or name."""
    names = {limits.model_path, limits.served_name} - {""}
    for model in base_models:
        if names & {model.name, model.hub_id or model.name, str(model.folder)}:
            return model.name
    return None


def mismatch(limits: Limits, model: BaseModel, is_operators: bool) -> str | None:
    """Why it cannot sample this base model. What its weights are of is compared where one of the operator's
    names a folder of this machine; a tenant's could name any."""
    theirs = _config(Path(limits.model_path)) if is_operators else {}
    ours = _config(model.folder)
    for name in _ARCHITECTURE if theirs else ():
        if name in theirs and name in ours and theirs[name] != ours[name]:
            return f"{name} is {theirs[name]} there and {ours[name]} in {model.name!r}"
    if limits.longest is not None and limits.longest < 2:
        return f"its sequences have at most {limits.longest} tokens"
    return None


def _config(folder: Path) -> dict[str, Any]:
    """Empty where there is none."""
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
