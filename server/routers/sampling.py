"""Sampling sessions and samples."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ...engine import messages
from ..errors import BadRequest
from ..ledger import samples, tenancy
from ..operation import Submission
from ..provenance import sequence_id
from ..wire import requests
from . import Backend, BackendOf, Owner, future

router = APIRouter(prefix="/api/v1", tags=["sampling"])


async def _weights(
    backend: Backend, owner: str, base_model: str | None, model_path: str | None
) -> tuple[str, str | None]:
    """The base model's name, and the directory of the weights on top of it, if any."""
    if model_path is None:
        if base_model is None:
            raise BadRequest("give base_model or model_path")
        return backend.base_model(base_model).name, None
    checkpoint = await backend.checkpoints.find_sampleable(owner, model_path)
    if base_model is not None and base_model != checkpoint.base_model:
        raise BadRequest(f"base_model: {model_path!r} was trained from {checkpoint.base_model!r}")
    return backend.base_model(checkpoint.base_model).name, checkpoint.directory


@router.post("/create_sampling_session")
async def create_sampling_session(
    body: requests.CreateSamplingSession, backend: BackendOf, owner: Owner
) -> dict[str, str]:
    await backend.sessions.require_active(owner, body.session_id)
    base_model, directory = await _weights(backend, owner, body.base_model, body.model_path)
    sampler = await backend.samplers.create(
        owner, body.session_id, body.sampling_session_seq_id, base_model, body.model_path, directory
    )
    return {"type": "create_sampling_session", "sampling_session_id": sampler.id}


@router.post("/join_sampling_session")
async def join_sampling_session(
    body: requests.JoinSamplingSession, backend: BackendOf, owner: Owner
) -> dict[str, Any]:
    """A copy of the session's client, pickled or made from a handle, asks for numbers of its own."""
    sampler = await backend.samplers.find(owner, body.sampling_session_id)
    number = await backend.ledger.write(lambda connection: tenancy.add_copy(connection, sampler.id))
    return {"type": "join_sampling_session", "client_counter": number}


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, backend: BackendOf, owner: Owner) -> dict[str, Any]:
    sampler = await backend.samplers.find(owner, sampler_id)
    return {"sampler_id": sampler.id, "base_model": sampler.base_model, "model_path": sampler.model_path}


@router.post("/asample")
async def asample(body: requests.Sample, backend: BackendOf, owner: Owner) -> dict[str, Any]:
    if body.sampling_session_id is not None:
        session = await backend.samplers.find(owner, body.sampling_session_id)
        await backend.samplers.sampled(session)
        sampler = session.ref
    else:
        base_model, directory = await _weights(backend, owner, body.base_model, body.model_path)
        sampler = messages.SamplerRef(base_model, weights=directory)
    model = backend.base_model(sampler.base_model)
    _check(body, backend)
    prompt = requests.prompt_tokens(body.prompt, model.vocab_size, model.max_sequence_length - 1)
    targets = None if body.target_prompt_logprobs is None else body.target_prompt_logprobs.message()
    key = None
    if body.sampling_session_id is not None and body.seq_id is not None:
        key = samples.natural_key(body.sampling_session_id, body.seq_id)

    def message(request_id: str) -> messages.Sample:
        return messages.Sample(
            request_id=request_id,
            sampler=sampler,
            prompt=prompt,
            num_samples=body.num_samples,
            params=body.sampling_params.message(),
            prompt_logprobs=bool(body.prompt_logprobs),
            topk_prompt_logprobs=body.topk_prompt_logprobs,
            topk_sample_logprobs=body.topk_sample_logprobs,
            prompt_logprobs_last_n=body.prompt_logprobs_last_n,
            prompt_targets=targets,
            prompt_alternatives=body.prompt_alt_tokens_k or 0,
        )

    with backend.admission.sample(owner) as accepted:
        operation = await backend.operations.accept(Submission(owner, "sample", key, message))
        accepted(operation)
    if body.sampling_session_id is not None and body.seq_id is not None:
        backend.completions.accepted(body.sampling_session_id, body.seq_id, operation)
    ids = [sequence_id(operation.request_id, index) for index in range(body.num_samples)]
    return future(operation) | {"sample_sequence_ids": ids}


def _check(body: requests.Sample, backend: Backend) -> None:
    if body.num_samples > backend.settings.max_samples:
        raise BadRequest(
            f"num_samples: {body.num_samples} is over the limit of {backend.settings.max_samples}"
        )
