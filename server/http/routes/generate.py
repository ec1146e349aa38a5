"""SGLang's `/generate`, so that one URL is enough for clients who train here and sample there."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...base_models import BaseModels
from ...offload import Offload
from ...text import tokenizer
from ...wire import inference
from ...wire.generate import Generate
from ..bodies import BodyRoute
from ..dependencies import Owner, described_as
from ..generate_answers import Answers, Prompt
from ..provided import Provided
from ..sample_targets import ServedModels
from ..samples import Prompts, ServedSamples, while_connected

router = APIRouter(tags=["inference"], route_class=BodyRoute)


@router.post(
    "/generate",
    response_model=None,
    responses=described_as(inference.Generated, events=inference.Generation),
)
async def generate(
    body: Generate,
    request: Request,
    base_models: Provided[BaseModels],
    offload: Provided[Offload],
    served_models: Provided[ServedModels],
    served: Provided[ServedSamples],
    owner: Owner,
) -> Response:
    """One object; a list of several prompts, or of several samples. With `stream` server-sent events, each
    with all there is so far. Closing the connection cancels the samples."""
    return await while_connected(request, _generate(body, base_models, offload, served_models, served, owner))


async def _generate(
    body: Generate,
    base_models: BaseModels,
    offload: Offload,
    served_models: ServedModels,
    served: ServedSamples,
    owner: str,
) -> Response:
    began = time.monotonic()
    named = {}
    prompts, asked = [], []
    for said in body.each:
        if said.model not in named:
            model = await served_models.find(owner, said.model)
            base = base_models.named(model.sampler.base_model)
            text = await asyncio.to_thread(tokenizer.of_folder, base.folder)
            named[said.model] = (
                Prompts(offload, owner, text, base.max_sequence_length),
                (model, base.vocab_size, text),
            )
        of_model, known = named[said.model]
        prompts.append(Prompt(said, *known))
        asked.append(prompts[-1].asked(await of_model.of(said.prompt), body.stream))
    answers = Answers(served, body, prompts, began)
    async with served.of_request(owner) as samples:
        running = await served.submit(samples, asked)
        if body.stream:
            samples.disown()
            return served.streamed(answers.events(owner, running))
        whole = await answers.whole(samples, running)
    return Response(whole, media_type="application/json")
