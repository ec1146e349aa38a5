"""JSON bodies, from the bytes to what the engine is sent."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fuzz.campaign import campaign
from fuzz.mutations import mutated_bytes, mutated_json
from pydantic import ValidationError
from tinsmith.engine import messages
from tinsmith.server import checkpoints
from tinsmith.server.errors import BadRequest
from tinsmith.server.http import errors
from tinsmith.server.http.model_creations import model_spec
from tinsmith.server.settings import Settings
from tinsmith.server.wire import Body, OfModel, describe, requests, sample_requests, training
from tinsmith.server.wire.sample_requests import prompt_tokens

VOCAB, LONGEST = 64, 32
LORA = {"rank": 8, "seed": 1, "train_unembed": True, "train_mlp": True, "train_attn": True}
ADAM = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
PARAMS = {"max_tokens": 4, "seed": 1, "stop": ["a"], "temperature": 1.0, "top_k": -1, "top_p": 0.9}
CSR = {"sparse_crow_indices": [0, 1, 1, 2], "sparse_col_indices": [0, 4]}
TARGETS = {"data": [3, -1], "dtype": "int64", "shape": [3, 5], **CSR}
PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3, 4]}]}
SAVE = {"model_id": "s:train:0", "seq_id": 1, "path": "a", "ttl_seconds": 7200, "user_metadata": {"a": "b"}}
VALID: list[tuple[type[Body], dict[str, Any]]] = [
    (requests.CreateSession, {"tags": ["a"], "user_metadata": {"a": 1}, "sdk_version": "0.38.0"}),
    (requests.SessionHeartbeat, {"session_id": "s"}),
    (requests.FinishSession, {"reason": {"type": "success"}, "detail": "done"}),
    (
        requests.CreateModel,
        {"session_id": "s", "model_seq_id": 0, "base_model": "tiny", "lora_config": LORA}
        | {"optimizer_config": {"type": "adamw"}, "user_metadata": {"a": [1]}},
    ),
    (OfModel, {"model_id": "s:train:0"}),
    (training.OptimStep, {"model_id": "s:train:0", "seq_id": 2, "adam_params": ADAM}),
    (training.OptimStep, {"model_id": "s:train:0", "optimizer_params": ADAM | {"type": "adamw"}}),
    (
        training.OptimStep,
        {"model_id": "s:train:0", "optimizer_params": {"type": "dimuon", "learning_rate": 1e-3}},
    ),
    (requests.SaveWeights, SAVE),
    (requests.SaveWeightsForSampler, SAVE | {"kind": "inflight", "sampling_session_seq_id": 0}),
    (requests.LoadWeights, {"path": "tinker://s:train:0/weights/a", "model_id": "s:train:1", "seq_id": 1}),
    (
        sample_requests.CreateSamplingSession,
        {"session_id": "s", "sampling_session_seq_id": 0, "base_model": "m"},
    ),
    *[
        (sample_requests.Sample, {"prompt": prompt, "num_samples": 2, "sampling_params": PARAMS} | more)
        for prompt in (PROMPT, {"tokens": [1, 2, 3, 4]})
        for more in (
            {"prompt_logprobs": True, "topk_prompt_logprobs": 3, "prompt_logprobs_last_n": 2},
            {"target_prompt_logprobs": TARGETS},
            {"target_prompt_logprobs": {"data": [1, 2, 3], "shape": [3, 1]}, "prompt_alt_tokens_k": 2},
        )
    ],
    (requests.RetrieveFuture, {"request_id": "r", "allow_metadata_only": True}),
    (requests.WeightsInfo, {"tinker_path": "tinker://s:train:0/weights/a"}),
    (requests.Ttl, {"ttl_seconds": 7200}),
]


def json_body(rng: random.Random) -> tuple[type[Body], bytes]:
    model, valid = rng.choice(VALID)
    data = json.dumps(mutated_json(rng, valid)).encode()
    return model, mutated_bytes(rng, data, 2) if rng.random() < 0.1 else data


@campaign(json_body)
def test_json_requests(case: tuple[type[Body], bytes], backend: SimpleNamespace) -> None:
    model, data = case
    try:
        content = json.loads(data)
    except Exception:  # FastAPI answers 400 or 422, whatever it is
        return
    try:
        body = model.model_validate(content)
    except ValidationError as error:
        json.loads(errors.error_response("/", 422, describe(list(error.errors())), "user").body)
        return
    try:
        message = _message(body, backend)
    except BadRequest as error:
        answer = errors.error_response("/", error.status, error.message, error.category)
        json.loads(answer.body)
        return
    if isinstance(body, requests.CreateSession | requests.CreateModel):
        json.dumps(body.user_metadata, ensure_ascii=False, allow_nan=False).encode()
    if message is not None:
        assert messages.decode_to_engine(messages.encode(message)) == message
    if isinstance(message, messages.Sample):
        _check_sample(message)


@pytest.fixture(scope="module")
def backend() -> SimpleNamespace:
    return SimpleNamespace(settings=Settings(model=["tiny"]))


def _message(body: Body, backend: SimpleNamespace) -> messages.ToEngine | None:
    """Return the message that the routers make of a body for the engine, if any. Raises BadRequest."""
    match body:
        case requests.CreateModel():
            spec = model_spec(body, "m", "tinker", backend.settings)
            json.dumps([spec.optimizer, spec.configuration, spec.warnings], allow_nan=False).encode()
            return spec.message
        case training.OptimStep():
            return body.message("m")
        case requests.SaveWeights():
            expires = checkpoints.expiry(body.ttl_seconds)
            assert expires is None or math.isfinite(expires)
            uri = checkpoints.named("s:train:0", "weights", body.short_name or "checkpoint-1")
            return messages.SaveState("r", body.model_id, str(uri))
        case requests.Ttl():
            checkpoints.expiry(body.ttl_seconds)
        case requests.WeightsInfo():
            checkpoints.parse(body.path or body.tinker_path or "")
        case sample_requests.Sample():
            targets = body.target_prompt_logprobs
            return messages.Sample(
                "r",
                messages.SamplerRef("tiny"),
                prompt_tokens(body.prompt, VOCAB, LONGEST),
                min(body.num_samples, backend.settings.max_samples),
                body.sampling_params.message(),
                prompt_logprobs_last_n=body.prompt_logprobs_last_n,
                prompt_targets=None if targets is None else targets.message(),
                prompt_alternatives=body.prompt_alt_tokens_k or 0,
            )
    return None


def _check_sample(message: messages.Sample) -> None:
    tokens = np.frombuffer(message.prompt, "<i4")
    assert 0 < len(tokens) <= LONGEST
    assert ((tokens >= 0) & (tokens < VOCAB)).all()
    if (cells := message.prompt_targets) is None:
        return
    rows, columns = cells.shape
    values = np.frombuffer(cells.values, "<i4")
    if cells.crow_indices is None:
        assert len(values) == rows * columns
        return
    crow, cols = np.frombuffer(cells.crow_indices, "<i8"), np.frombuffer(cells.col_indices or b"", "<i8")
    assert [*crow] == sorted(crow)
    assert (len(crow), crow[0], crow[-1]) == (rows + 1, 0, len(values))
    assert len(cols) == len(values)
    assert all(0 <= column < columns for column in cols)


@pytest.mark.parametrize(
    "change",
    [
        {"sampling_params": {"max_tokens": 10**30}},
        {"sampling_params": {"top_k": 10**30}},
        {"sampling_params": {"stop": [10**30]}},
        {"prompt_logprobs_last_n": 10**30},
        {"target_prompt_logprobs": {"data": [], "shape": [10**30, 0]}},
        {"target_prompt_logprobs": TARGETS | {"sparse_crow_indices": [0, 1 << 63, 0, 2]}},
    ],
    ids=lambda change: str(*change),
)
def test_numbers_that_no_message_can_hold_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        sample_requests.Sample.model_validate({"prompt": PROMPT} | change)


def test_optimizer_params_out_of_range_are_refused() -> None:
    with pytest.raises(ValidationError, match="learning_rate"):
        training.OptimStep.model_validate({"model_id": "m", "optimizer_params": {"learning_rate": -1}})


@pytest.mark.parametrize(
    "value",
    ["\ud800", float("nan"), [1, {"a": "\udfff"}], 1 << 64, [-1 << 64]],
    ids=["text", "nan", "nested", "huge", "nested huge"],
)
def test_values_that_no_answer_could_show_are_refused(value: Any) -> None:
    with pytest.raises(ValidationError, match="not JSON"):
        requests.CreateSession.model_validate({"user_metadata": {"a": value}})


def test_half_a_character_is_not_a_name() -> None:
    with pytest.raises(ValidationError, match="base_model"):
        requests.CreateModel.model_validate({"session_id": "s", "model_seq_id": 0, "base_model": "\ud800"})


def test_half_a_character_is_not_a_stop_string() -> None:
    with pytest.raises(ValidationError, match="stop"):
        sample_requests.SamplingParams.model_validate({"stop": ["a", "\ud800"]})


def test_an_answer_may_quote_halves_of_surrogate_pairs() -> None:
    answer = errors.error_response("/api/\udfff", 400, "chunk 0: \ud800 is not supported", "user")
    said = json.loads(answer.body)
    assert (said["error"], said["path"]) == ("chunk 0: \\ud800 is not supported", "/api/\\udfff")
