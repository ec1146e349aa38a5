"""SGLang's `/generate`, so that one URL is enough for clients who train here and sample there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from ...engine import messages
from ..errors import ApiError
from ..served import served_models, served_samples, tokenizer
from ..served.hang_ups import while_connected
from ..served.prompts import Prompts
from ..served.request_samples import RequestSamples
from ..served.sampled_text import SampledText
from ..served.served_samples import Asked, Running
from ..wire import generate as wire
from ..wire.sampled import tokens_of
from . import Backend, BackendOf, Owner
from .bodies import BodyRoute

router = APIRouter(tags=["inference"], route_class=BodyRoute)

DONE = b"data: [DONE]\n\n"


@router.post("/generate", response_model=None)
async def generate(body: wire.Generate, request: Request, backend: BackendOf, owner: Owner) -> Response:
    """One object; a list of several prompts, or of several samples. With `stream` server-sent events, each
    with all there is so far. Closing the connection cancels the samples."""
    return await while_connected(request, _generate(body, backend, owner))


async def _generate(body: wire.Generate, backend: Backend, owner: str) -> Response:
    model = await served_models.find(backend, owner, body.lora_path or body.model)
    base = backend.base_model(model.sampler.base_model)
    text = await asyncio.to_thread(tokenizer.of_folder, base.folder)
    params = body.sampling_params
    began = time.monotonic()
    prompts = Prompts(backend, owner, model, text)
    asked = [
        Asked(
            model,
            await prompts.of(prompt),
            params.message(text.end_tokens),
            num_samples=params.n,
            topk=body.top_logprobs_num if body.return_logprob else 0,
            prompt_logprobs=body.return_logprob and body.logprob_start_len >= 0,
            stream=body.stream,
        )
        for prompt in body.prompts
    ]
    answers = Answers(body, text, began)
    async with RequestSamples(backend, owner) as samples:
        running = await served_samples.submit(samples, asked)
        if body.stream:
            samples.disown()
            return StreamingResponse(answers.events(backend, running[0]), media_type="text/event-stream")
        outputs = await served_samples.answers(running)
    found = [
        answers.of(each, output, sequence)
        for each, output in zip(running, outputs, strict=True)
        for sequence in output.sequences
    ]
    whole: Any = found if body.is_batch or params.n > 1 else found[0]
    return Response(orjson.dumps(whole), media_type="application/json")


class Answers:
    """In SGLang's shape."""

    def __init__(self, body: wire.Generate, text: tokenizer.ChatTokenizer, began: float):
        self._body, self._text, self._began = body, text, began

    def sampled_text(self, asked: Asked) -> SampledText:
        params = self._body.sampling_params
        return SampledText(
            self._text,
            asked.params.stop_strings,
            asked.params.stop_tokens or [],
            keep_stop=params.no_stop_trim,
            skip_special_tokens=params.skip_special_tokens,
            prompt=asked.prompt,
        )

    def of(
        self, running: Running, output: messages.SampleOutput, sequence: messages.SampledSequence
    ) -> dict[str, Any]:
        asked = running.asked
        sampled_text = self.sampled_text(asked)
        tokens, logprobs = wire.sampled(sequence)
        ended_by = sampled_text.matched(tokens, sequence.stop_reason)
        reason = {"type": "stop", "matched": ended_by}
        if sequence.stop_reason == "length":
            reason = {"type": "length", "length": len(tokens)}
        meta = self._meta(running, tokens) | {
            "finish_reason": reason,
            "cached_tokens": output.prompt_cache_hit_tokens,
            "e2e_latency": time.monotonic() - self._began,
        }
        if self._body.return_logprob:
            meta |= self._logprobs(asked, output, sequence, tokens, logprobs)
        text = sampled_text.whole(tokens, sequence.stop_reason)
        return {"text": text, "output_ids": tokens, "meta_info": meta}

    async def events(self, backend: Backend, running: Running) -> AsyncIterator[bytes]:
        sampled_text = self.sampled_text(running.asked)
        try:
            async for _, part in served_samples.drawn(backend, [running]):
                if isinstance(part, messages.SampleOutput):
                    yield _event(self.of(running, part, part.sequences[0]))
                    continue
                tokens = tokens_of(part.tokens)
                if part.begin + len(tokens) <= len(sampled_text.tokens):  # of an engine that began it again
                    continue
                sampled_text.add(part.begin, tokens)
                meta = self._meta(running, sampled_text.tokens) | {"finish_reason": None}
                yield _event(
                    {"text": sampled_text.told, "output_ids": sampled_text.tokens, "meta_info": meta}
                )
        except ApiError as error:
            yield _event({"error": {"message": error.message, "code": error.status}})
        yield DONE

    def _meta(self, running: Running, tokens: list[int]) -> dict[str, Any]:
        asked = running.asked
        return {
            "id": self._body.rid or running.operation.request_id,
            "prompt_tokens": len(asked.prompt),
            "completion_tokens": len(tokens),
            "weight_version": asked.model.version,
        }

    def _logprobs(
        self,
        asked: Asked,
        output: messages.SampleOutput,
        sequence: messages.SampledSequence,
        tokens: list[int],
        logprobs: list[float | None],
    ) -> dict[str, Any]:
        found: dict[str, Any] = {
            "output_token_logprobs": wire.logprob_entries(tokens, logprobs, self._texts(tokens)),
            "output_token_logprobs_length": len(tokens),
        }
        if self._body.top_logprobs_num:
            found["output_top_logprobs"] = wire.top_entries(sequence)
        if asked.prompt_logprobs:
            begin = self._body.logprob_start_len
            entries = wire.logprob_entries(
                asked.prompt, wire.prompt_logprobs(output), self._texts(asked.prompt)
            )
            found["input_token_logprobs"] = entries[begin:]
        return found

    def _texts(self, tokens: list[int]) -> list[str] | None:
        return [self._text.token(token) for token in tokens] if self._body.return_text_in_logprobs else None


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
