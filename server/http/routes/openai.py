"""OpenAI's completions, of any base model or sampler by name."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from ...text import tokenizer
from ...wire import inference_responses
from ...wire.openai import ChatCompletions, Completions
from .. import served_models, served_samples
from ..bodies import BodyRoute
from ..dependencies import Backend, BackendOf, Owner, described_as
from ..hang_ups import while_connected
from ..openai_answers import Answers, ChatAnswers, CompletionAnswers
from ..prompts import Prompts
from ..request_samples import RequestSamples
from ..served_samples import Asked

router = APIRouter(prefix="/v1", tags=["inference"], route_class=BodyRoute)


@router.post(
    "/completions",
    response_model=None,
    responses=described_as(
        inference_responses.TextCompletion, events=inference_responses.TextCompletionChunk
    ),
)
async def completions(body: Completions, request: Request, backend: BackendOf, owner: Owner) -> Response:
    """Of one prompt or several, `n` each. With `stream` server-sent events. Closing the connection cancels
    the samples."""
    return await while_connected(request, _completions(body, backend, owner))


async def _completions(body: Completions, backend: Backend, owner: str) -> Response:
    model, text = await _named(backend, owner, body.model)
    prompts = Prompts(backend, owner, model, text)
    scores_prompt = body.echo and body.logprobs is not None
    asked = [
        Asked(
            model,
            await prompts.of(given),
            body.params(text.end_tokens),
            num_samples=body.num_samples,
            topk=body.logprobs or 0,
            prompt_logprobs=scores_prompt,
            prompt_topk=(body.logprobs or 0) if scores_prompt else 0,
            stream=body.stream,
            prompt_field="prompt" if len(body.prompts) == 1 else f"prompt[{place}]",
            count_field="n" if body.best_of is None else "best_of",
            echo=body.echo,
            prompt_text=given if isinstance(given, str) else None,
        )
        for place, given in enumerate(body.prompts)
    ]
    answers = CompletionAnswers(
        body.model,
        text,
        body.logprobs is not None,
        body.with_usage,
        body.n,
        body.no_stop_trim,
        body.skip_special_tokens,
    )
    return await _answered(backend, owner, answers, asked)


@router.post(
    "/chat/completions",
    response_model=None,
    responses=described_as(
        inference_responses.ChatCompletion, events=inference_responses.ChatCompletionChunk
    ),
)
async def chat_completions(
    body: ChatCompletions, request: Request, backend: BackendOf, owner: Owner
) -> Response:
    """The conversation as the model's chat template writes it, gone on with. With `stream` server-sent
    events. Closing the connection cancels the samples."""
    return await while_connected(request, _chat_completions(body, backend, owner))


async def _chat_completions(body: ChatCompletions, backend: Backend, owner: str) -> Response:
    model, text = await _named(backend, owner, body.model)
    prompts = Prompts(backend, owner, model, text)
    turns = [message.turn() for message in body.messages]
    asked = Asked(
        model,
        await prompts.of_conversation(turns, **body.template_variables),
        body.params(text.end_tokens),
        num_samples=body.n,
        topk=body.top_logprobs,
        stream=body.stream,
        prompt_field="messages",
    )
    answers = ChatAnswers(
        body.model,
        text,
        body.logprobs,
        body.with_usage,
        body.n,
        body.no_stop_trim,
        body.skip_special_tokens,
    )
    return await _answered(backend, owner, answers, [asked])


async def _named(
    backend: Backend, owner: str, name: str
) -> tuple[served_models.ServedModel, tokenizer.ChatTokenizer]:
    model = await served_models.find(backend, owner, name)
    folder = backend.base_model(model.sampler.base_model).folder
    return model, await asyncio.to_thread(tokenizer.of_folder, folder)


async def _answered(backend: Backend, owner: str, answers: Answers, asked: list[Asked]) -> Response:
    async with RequestSamples(backend, owner) as samples:
        running = await served_samples.submit(samples, asked)
        if asked[0].stream:
            samples.disown()
            return StreamingResponse(answers.events(backend, running), media_type="text/event-stream")
        outputs = await served_samples.answers(running)
    answered = list(zip(running, outputs, strict=True))
    whole = await served_samples.written(backend, owner, outputs, lambda: answers.whole(answered))
    return Response(whole, media_type="application/json")
