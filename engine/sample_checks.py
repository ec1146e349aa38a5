"""Whether a sample request can be served, and if not, why."""

from __future__ import annotations

import numpy as np

from ..model.token_sampling import TOP_K
from . import messages
from .errors import UserError


def check_request(
    request: messages.Sample, prompt: np.ndarray, vocab_size: int, longest: int, has_tokenizer: bool
) -> None:
    """Raise UserError if the request cannot be served; `longest` is the most tokens a prompt may have."""
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
        if not 0 <= getattr(request, name) <= TOP_K:
            raise UserError(f"{name}: {getattr(request, name)}; it must be between 0 and {TOP_K}")
    if params.stop_strings and not has_tokenizer:
        raise UserError("stop: this model has no tokenizer on the server; give stop token ids instead")
