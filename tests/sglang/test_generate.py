"""Our `/generate` beside an SGLang's: the same requests, and answers of the same shape and content."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from conformance.server_process import Wire

PROMPT = [5, 9, 77, 30, 12, 6]
GREEDY = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}
SCORES = {"return_logprob": True, "top_logprobs_num": 2, "token_ids_logprob": [7, 8]}
BODIES = {
    "plain": {"input_ids": PROMPT},
    "scores": {"input_ids": PROMPT, **SCORES},
    "scores from the beginning": {"input_ids": PROMPT, **SCORES, "logprob_start_len": 0},
    "scores from the middle": {"input_ids": PROMPT, **SCORES, "logprob_start_len": 3},
    "scores from the end": {"input_ids": PROMPT, **SCORES, "logprob_start_len": 6},
    "texts": {"input_ids": PROMPT, **SCORES, "logprob_start_len": 0, "return_text_in_logprobs": True},
    "nothing new": {
        "input_ids": PROMPT,
        "sampling_params": GREEDY | {"max_new_tokens": 0},
        **SCORES,
        "logprob_start_len": 0,
    },
    "lists": {
        "input_ids": [PROMPT, PROMPT[:3]],
        "sampling_params": [GREEDY, GREEDY | {"max_new_tokens": 1}],
        "return_logprob": [True, False],
        "logprob_start_len": [2, -1],
        "top_logprobs_num": [1, 0],
        "rid": ["a", "b"],
    },
    "several of several": {"input_ids": [PROMPT, PROMPT[:3]], "sampling_params": GREEDY | {"n": 2}},
    "one in a list": {"text": ["hello"]},
}
OWN = {"id", "e2e_latency", "cached_tokens", "cached_tokens_details", "dp_rank", "response_sent_to_client_ts"}


def alike(ours: Any, theirs: Any) -> None:
    """Numbers to within what float32 leaves, all else exactly."""
    if isinstance(theirs, dict):
        assert set(ours) - OWN == set(theirs) - OWN
        for name in set(theirs) - OWN:
            alike(ours[name], theirs[name])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for each, other in zip(ours, theirs, strict=True):
            alike(each, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-4)
    else:
        assert ours == theirs


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_answers_are_those_of_sglang(alice: Wire, sglang: Any, body: dict[str, Any]) -> None:
    body = {"sampling_params": GREEDY} | body
    theirs = httpx.post(f"{sglang.url}/generate", json=body, timeout=60)
    ours = alice.http.post("/generate", json=body)
    assert (theirs.status_code, ours.status_code) == (200, 200), ours.text
    alike(ours.json(), theirs.json())
