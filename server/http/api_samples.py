"""Samples of the routes `asample` and `sample`, from their bodies to the ledger."""

from __future__ import annotations

import asyncio
from typing import Any

from ...ckpt.tokenizer_files import end_tokens
from ...engine import messages
from ..base_models import BaseModels
from ..dialect import POINTS, Dialect
from ..errors import BadRequest
from ..ledger.operations import SampleNumber
from ..models.submits import SampleSubmits
from ..operations.operation import Operation, Submission
from ..operations.operations import Operations
from ..operations.sample_streams import Completions
from ..wire import sampling as wire
from ..wire.results import tokens_of
from ..wire.sampling import ModelInput, longest_prompt, prompt_tokens
from .operation_answers import PROMPT_END
from .sample_targets import SampleTargets, Target
from .served_samples import RequestSamples

_CONTEXT = 8  # tokens of a prompt that its samples are decoded after


class ApiSamples:
    """Submits what the bodies of `asample` and `sample` ask for, at most `max_samples` of a prompt."""

    def __init__(
        self,
        base_models: BaseModels,
        targets: SampleTargets,
        submits: SampleSubmits,
        operations: Operations,
        completions: Completions,
        max_samples: int,
    ):
        self._base_models = base_models
        self._targets = targets
        self._submits = submits
        self._operations = operations
        self._completions = completions
        self._max_samples = max_samples

    async def submit(self, owner: str, body: wire.Sample, said: Dialect | None) -> Operation:
        """Accept the samples of one prompt. Raises ApiError."""
        found = await self._targets.target(owner, body)
        return await self._submit(owner, body, body.prompt, found, body.seq_id, said)

    async def submit_all(
        self, owner: str, body: wire.SampleNow, samples: RequestSamples, said: Dialect | None
    ) -> Operation:
        """Accept the samples of all prompts, or none of them. Raises ApiError."""
        found = await self._targets.target(owner, body)
        if body.prompt is not None:
            return await samples.own(self._submit(owner, body, body.prompt, found, body.seq_id, said))
        inputs = [ModelInput.model_construct(tokens=tokens) for tokens in body.prompts or []]
        each = [await samples.own(self._submit(owner, body, prompt, found, None, said)) for prompt in inputs]
        return await self._operations.accept(
            Submission(
                owner,
                "samples",
                None,
                None,
                {"parts": [operation.request_id for operation in each]},
                also=lambda _connection, request_id: messages.Done(request_id, messages.Nothing()),
                dialect=said or "tinkercloud",
            )
        )

    async def _submit(
        self,
        owner: str,
        body: wire.SampleFields,
        given: ModelInput,
        found: Target,
        seq_id: int | None,
        said: Dialect | None,
    ) -> Operation:
        sampler = found.ref
        model = self._base_models.named(sampler.base_model)
        if body.num_samples > self._max_samples:
            raise BadRequest(f"num_samples: {body.num_samples} is over the limit of {self._max_samples}")
        longest = longest_prompt(model.max_sequence_length, body.sampling_params.max_tokens)
        prompt = prompt_tokens(given, model.vocab_size, longest)
        targets = None if body.target_prompt_logprobs is None else body.target_prompt_logprobs.message()
        number: SampleNumber | None = None
        if found.session is not None and seq_id is not None:
            number = SampleNumber(found.session.session_id, found.session.id, seq_id)
        dialect = said or "tinkercloud"
        ends = await asyncio.to_thread(end_tokens, model.folder) if POINTS[dialect].stops_add else ()
        params = body.sampling_params.message(dialect, ends)

        sample = messages.Sample(
            request_id="",
            sampler=sampler,
            prompt=prompt,
            num_samples=body.num_samples,
            params=params,
            prompt_logprobs=bool(body.prompt_logprobs),
            topk_prompt_logprobs=body.topk_prompt_logprobs,
            topk_sample_logprobs=body.topk_sample_logprobs,
            prompt_logprobs_last_n=body.prompt_logprobs_last_n,
            prompt_targets=targets,
            prompt_alternatives=body.prompt_alt_tokens_k or 0,
        )
        # The SDK has the tokenizer; others are told what the tokens say.
        reply: dict[str, Any] = {}
        if dialect != "tinker":
            reply = {"base_model": sampler.base_model, PROMPT_END: tokens_of(prompt[-4 * _CONTEXT :])}
        operation = await self._submits.submit(owner, sample, number, reply, dialect)
        if number is not None:
            self._completions.accepted(number.sampler_id, number.number, operation)
        return operation
