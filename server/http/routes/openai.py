"""OpenAI's completions, of any base model or sampler by name."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...base_models import BaseModel, BaseModels
from ...offload import Offload
from ...text import tokenizer
from ...wire import inference
from ...wire.openai import ChatCompletions, Completions
from ..bodies import BodyRoute
from ..dependencies import Owner, described_as
from ..openai_answers import Answers, ChatAnswers, CompletionAnswers
from ..provided import Provided
from ..sample_targets import ServedModel, ServedModels
from ..samples import Asked, Prompts, ServedSamples, while_connected
from ..samples import answers as outputs_of

router = APIRouter(prefix="/v1", tags=["inference"], route_class=BodyRoute)


@router.post(
    "/completions",
    response_model=None,
    responses=described_as(inference.TextCompletion, events=inference.TextCompletionChunk),
)
async def completions(
    body: Completions,
    request: Request,
    base_models: Provided[BaseModels],
    offload: Provided[Offload],
    served_models: Provided[ServedModels],
    served: Provided[ServedSamples],
    owner: Owner,
) -> Response:
    """Of one prompt or several, `n` each. With `stream` server-sent events. Closing the connection cancels
    the samples."""
    return await while_connected(
        request, _completions(body, base_models, offload, served_models, served, owner)
    )


async def _completions(
    body: Completions,
    base_models: BaseModels,
    offload: Offload,
    served_models: ServedModels,
    served: ServedSamples,
    owner: str,
) -> Response:
    model, base, text = await _named(base_models, served_models, owner, body.model)
    prompts = Prompts(offload, owner, text, base.max_sequence_length)
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
    return await _answered(served, owner, answers, asked)


@router.post(
    "/chat/completions",
    response_model=None,
    responses=described_as(inference.ChatCompletion, events=inference.ChatCompletionChunk),
)
async def chat_completions(
    body: ChatCompletions,
    request: Request,
    base_models: Provided[BaseModels],
    offload: Provided[Offload],
    served_models: Provided[ServedModels],
    served: Provided[ServedSamples],
    owner: Owner,
) -> Response:
    """The conversation as the model's chat template writes it, gone on with. With `stream` server-sent
    events. Closing the connection cancels the samples."""
    return await while_connected(
        request, _chat_completions(body, base_models, offload, served_models, served, owner)
    )


async def _chat_completions(
    body: ChatCompletions,
    base_models: BaseModels,
    offload: Offload,
    served_models: ServedModels,
    served: ServedSamples,
    owner: str,
) -> Response:
    model, base, text = await _named(base_models, served_models, owner, body.model)
    prompts = Prompts(offload, owner, text, base.max_sequence_length)
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
    return await _answered(served, owner, answers, [asked])


async def _named(
    base_models: BaseModels, served_models: ServedModels, owner: str, name: str
) -> tuple[ServedModel, BaseModel, tokenizer.ChatTokenizer]:
    model = await served_models.find(owner, name)
    base = base_models.named(model.sampler.base_model)
    return model, base, await asyncio.to_thread(tokenizer.of_folder, base.folder)


async def _answered(served: ServedSamples, owner: str, answers: Answers, asked: list[Asked]) -> Response:
    async with served.of_request(owner) as samples:
        running = await served.submit(samples, asked)
        if asked[0].stream:
            samples.disown()
            return served.streamed(answers.events(served, running))
        outputs = await outputs_of(running)
    answered = list(zip(running, outputs, strict=True))
    whole = await served.written(owner, outputs, lambda: answers.whole(answered))
    return Response(whole, media_type="application/json")
