"""Checks whether a sample request can be served."""

from __future__ import annotations

import numpy as np

from .. import messages
from ..errors import UserError


def check_request(
    request: messages.Sample,
    prompt: np.ndarray,
    vocab_size: int,
    longest: int,
    has_tokenizer: bool,
    routing: tuple[int, int, int] | None = None,
) -> None:
    """Raise UserError if the request cannot be served.

    `longest` is the most tokens a prompt may have, and `routing` is `ModelConfig.routing`."""
    params = request.params
    if len(prompt) == 0:
        raise UserError("prompt: it has no tokens; at least one is needed")
    wrong = np.flatnonzero((prompt < 0) | (prompt >= vocab_size))
    if len(wrong):
        raise UserError(
            f"prompt: token {prompt[wrong[0]]} at position {wrong[0]} is outside of 0..{vocab_size - 1}"
        )
    if len(prompt) > longest:
        raise UserError(f"prompt: {len(prompt)} tokens; this server takes at most {longest}")
    if request.num_samples < 1:
        raise UserError(f"num_samples: {request.num_samples}; it must be at least 1")
    if params.max_tokens is not None and params.max_tokens < 1:
        raise UserError(f"max_tokens: {params.max_tokens}; it must be at least 1")
    if not 0.0 <= params.temperature < float("inf"):
        raise UserError(f"temperature: {params.temperature}; it must be 0 (greedy) or positive")
    if not 0.0 < params.top_p <= 1.0:
        raise UserError(f"top_p: {params.top_p}; it must be above 0 and at most 1")
    if params.top_k < -1:
        raise UserError(f"top_k: {params.top_k}; it must be positive, or -1 for off")
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        if not 0 <= getattr(request, name) <= messages.TOPK_LIMIT:
            raise UserError(f"{name}: {getattr(request, name)}; it must be 0 to {messages.TOPK_LIMIT}")
    if not 0.0 <= params.min_p <= 1.0:
        raise UserError(f"min_p: {params.min_p}; it must be between 0 (off) and 1")
    if not 0.01 <= params.repetition_penalty <= 100.0:
        raise UserError(
            f"repetition_penalty: {params.repetition_penalty}; it must be between 0.01 and 100, 1 is off"
        )
    for name in ("presence_penalty", "frequency_penalty"):
        if not -2.0 <= getattr(params, name) <= 2.0:
            raise UserError(f"{name}: {getattr(params, name)}; it must be between -2 and 2, 0 is off")
    if not 0 <= request.prompt_alternatives <= messages.ALTERNATIVES_LIMIT:
        raise UserError(
            f"prompt_alt_tokens_k: {request.prompt_alternatives}; it must be 0 to "
            f"{messages.ALTERNATIVES_LIMIT}"
        )
    last_n = request.prompt_logprobs_last_n
    if last_n is not None and not request.prompt_logprobs:
        raise UserError("prompt_logprobs_last_n: it applies to prompt_logprobs, which were not asked for")
    if last_n is not None and not 1 <= last_n < len(prompt):
        raise UserError(
            f"prompt_logprobs_last_n: {last_n}; it must be between 1 and the prompt's {len(prompt)} tokens "
            "less one"
        )
    if request.record_routing:
        _check_routing(request, len(prompt), longest, routing)
    if request.prompt_targets is not None:
        _check_targets(request.prompt_targets, len(prompt), vocab_size)
    if params.stop_strings and not has_tokenizer:
        raise UserError("stop: this model has no tokenizer on the server; give stop token ids instead")


def _check_routing(
    request: messages.Sample, prompt_length: int, longest: int, routing: tuple[int, int, int] | None
) -> None:
    if routing is None:
        raise UserError("record_routing: this model has no experts")
    layers, chosen, _ = routing
    drawn = longest if request.params.max_tokens is None else request.params.max_tokens
    tokens = request.num_samples * min(prompt_length + drawn, longest)
    most = messages.ROUTING_LIMIT // (2 * layers * chosen)
    if tokens > most:
        raise UserError(
            f"record_routing: {request.num_samples} samples may have {tokens} tokens with their prompts; one "
            f"request records the experts of {most}; send fewer samples or a smaller max_tokens"
        )


def _check_targets(cells: messages.PromptCells, prompt_length: int, vocab_size: int) -> None:
    name, (rows, columns) = "target_prompt_logprobs", cells.shape
    tokens = np.frombuffer(cells.values, np.int32)
    if rows != prompt_length - 1:
        raise UserError(f"{name}: {rows} rows; a prompt of {prompt_length} tokens needs {prompt_length - 1}")
    wrong = tokens[(tokens < -1) | (tokens >= vocab_size)]
    if len(wrong):
        raise UserError(f"{name}: token {wrong[0]} is outside of 0..{vocab_size - 1} (-1 asks for nothing)")
    if not (tokens >= 0).any():
        raise UserError(f"{name}: it names no token")
    widest = columns
    if cells.crow_indices is not None:
        widest = int(np.diff(np.frombuffer(cells.crow_indices, np.int64)).max())
    if widest > messages.TARGETS_LIMIT:
        raise UserError(
            f"{name}: {widest} tokens at one position; at most {messages.TARGETS_LIMIT} are scored"
        )
