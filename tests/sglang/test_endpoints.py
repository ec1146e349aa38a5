"""Servers that come, go and come back, and what becomes of the samples that they were drawing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engineless import Server
from tinsmith.engine import messages
from tinsmith.server.base_models import BaseModel, resolve
from tinsmith.server.inference import endpoints as registered
from tinsmith.server.inference.endpoint import Endpoint, EndpointDied
from tinsmith.server.inference.endpoints import Endpoints, Registered
from tinsmith.server.inference.sampling import Sampling
from tinsmith.server.ledger import tenancy
from tinsmith.server.operations.operation import Operation, Submission

from .proxy import Proxy

PROMPT = [5, 9, 77, 30, 12, 6]


MakePlace = Callable[..., Awaitable["Place"]]
LONG = 120  # tokens: more than a second


class NoAdapters:
    async def ensure(self, endpoint: Registered, sampler: messages.SamplerRef) -> str:
        raise AssertionError

    def lost(self, endpoint: Registered, sampler: messages.SamplerRef) -> None:
        raise AssertionError


class Place:
    """The server without routers and engine; what would go to the engine is `embedded`."""

    def __init__(self, data_dir: Path, model: BaseModel, engine: messages.SamplingEngine):
        data_dir.mkdir()
        self.server = Server(data_dir)
        self.operations = self.server.operations
        self.endpoints = Endpoints({model.name: model})
        self.drawn: list[messages.Drawn] = []
        self.embedded: list[Operation] = []
        self.operations.send_to_engine = self.embedded.append  # type: ignore[method-assign]
        self.sampling = Sampling(
            self.operations,
            self.endpoints,
            NoAdapters(),
            {model.name: model},
            engine,
            patience_seconds=300.0,
            on_drawn=self.drawn.append,
        )

    def add(self, url: str) -> Registered:
        endpoint = Registered(Endpoint(url), None, None)
        self.endpoints.add(endpoint)
        return endpoint

    async def ask(self, max_tokens: int = 8, stream: bool = False) -> Operation:
        params = messages.SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_tokens=[])
        prompt = np.asarray(PROMPT, "<i4").tobytes()

        def message(request_id: str) -> messages.Sample:
            ref = messages.SamplerRef("tiny")
            return messages.Sample(request_id, ref, prompt, 1, params, stream=stream)

        return await self.operations.accept(Submission("me", "sample", None, message))


@pytest.fixture
async def make_place(
    tmp_path: Path, sglang: Any, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[MakePlace]:
    monkeypatch.setattr(registered, "CHECK_SECONDS", 0.1)
    places: list[Place] = []
    model = resolve(f"tiny={sglang.model}", tmp_path, None)

    async def make(engine: messages.SamplingEngine = "auto") -> Place:
        places.append(Place(tmp_path / f"data{len(places)}", model, engine))
        owner = partial(tenancy.ensure_tenant, tenant="me")
        await places[-1].server.ledger.write(owner)
        return places[-1]

    yield make
    for place in places:
        await place.sampling.finish(0)
        await place.endpoints.close()
        place.server.ledger.close()


@pytest.fixture
async def proxy(sglang: Any) -> AsyncIterator[Proxy]:
    made = Proxy(sglang.port)
    await made.open()
    yield made
    made.kill()


async def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def tokens(operation: Operation, seconds: float = 60.0) -> list[int]:
    await asyncio.wait_for(operation.finished.wait(), seconds)
    assert isinstance(operation.answer, messages.Done), operation.answer
    assert isinstance(operation.answer.output, messages.SampleOutput)
    return np.frombuffer(operation.answer.output.sequences[0].tokens, "<i4").tolist()


async def under_way(proxy: Proxy, endpoint: Registered) -> None:
    """A sample is being drawn there."""
    await until(lambda: endpoint.running == 1)
    await asyncio.sleep(0.3)
    assert endpoint.running == 1


async def test_it_is_found_to_be_what_it_is(make_place: MakePlace, sglang: Any) -> None:
    place = await make_place()
    endpoint = place.add(sglang.url)
    await until(lambda: endpoint.healthy)
    assert (endpoint.base_model, endpoint.life, endpoint.weight_version) == ("tiny", 1, "default")
    assert endpoint.limits is not None
    assert endpoint.limits.enable_lora
    assert endpoint.limits.longest
    assert endpoint.limits.max_lora_rank
    assert "api_key" not in endpoint.limits.server_info
    assert len(await tokens(await place.ask())) == 8
    assert (endpoint.answered, place.embedded) == (1, [])


async def test_one_that_dies_leaves_its_samples_to_another(
    make_place: MakePlace, sglang: Any, proxy: Proxy
) -> None:
    """Whole: not a token of what the dead one had drawn is kept."""
    place = await make_place()
    dying, other = place.add(proxy.url), place.add(sglang.url)
    await until(lambda: dying.healthy and other.healthy)
    asked = await place.ask(max_tokens=LONG)
    await under_way(proxy, dying)
    proxy.kill()
    assert len(await tokens(asked)) == LONG
    assert (other.answered, dying.answered, place.embedded) == (1, 0, [])
    assert not dying.healthy


async def test_without_another_the_engine_draws_them(make_place: MakePlace, proxy: Proxy) -> None:
    place = await make_place()
    dying = place.add(proxy.url)
    await until(lambda: dying.healthy)
    asked = await place.ask(max_tokens=LONG)
    await under_way(proxy, dying)
    proxy.kill()
    await until(lambda: place.embedded == [asked])
    assert asked.answer is None
    later = await place.ask()
    await until(lambda: place.embedded == [asked, later])


async def test_sglang_alone_is_waited_for_and_comes_back(make_place: MakePlace, proxy: Proxy) -> None:
    """And the more often it goes, the longer it is left out."""
    place = await make_place("sglang")
    endpoint = place.add(proxy.url)
    await until(lambda: endpoint.healthy)
    asked = await place.ask(max_tokens=LONG)
    for life in (1, 2):
        await under_way(proxy, endpoint)
        assert endpoint.life == life
        proxy.kill()
        await until(lambda: not endpoint.healthy)
        cut_at = time.monotonic()
        await proxy.open()
        await until(lambda: endpoint.healthy)
        assert (time.monotonic() - cut_at >= 1.9) == (life == 2)
    assert len(await tokens(asked)) == LONG
    assert (endpoint.answered, place.embedded) == (1, [])


async def test_a_stream_of_which_something_was_told_is_not_begun_again(
    make_place: MakePlace, proxy: Proxy
) -> None:
    place = await make_place()
    endpoint = place.add(proxy.url)
    await until(lambda: endpoint.healthy)
    asked = await place.ask(max_tokens=LONG, stream=True)
    await until(lambda: len(place.drawn) > 3)
    proxy.kill()
    await asyncio.wait_for(asked.finished.wait(), 10)
    assert isinstance(asked.answer, messages.Failed)
    assert asked.answer.category == "server"
    assert "stream" in asked.answer.message
    told = [len(each.tokens) // 4 for each in place.drawn]
    assert [each.begin for each in place.drawn] == np.cumsum([0, *told[:-1]]).tolist()


async def test_what_a_stopped_server_had_not_answered_is_done_by_the_next(
    make_place: MakePlace, sglang: Any
) -> None:
    place = await make_place()
    endpoint = place.add(sglang.url)
    await until(lambda: endpoint.healthy)
    asked = await place.ask(max_tokens=LONG)
    await until(lambda: endpoint.running == 1)
    await place.sampling.finish(0.2)
    assert place.operations.unanswered() == [asked]
    place.operations.send(asked)  # as the next start does
    assert len(await tokens(asked)) == LONG


async def test_weights_change_only_between_samples(make_place: MakePlace, sglang: Any) -> None:
    place = await make_place()
    endpoint = place.add(sglang.url)
    await until(lambda: endpoint.healthy)
    first = await place.ask(max_tokens=100)
    await until(lambda: endpoint.running == 1)
    async with endpoint.exclusive():
        assert endpoint.running == 0
        assert endpoint.answered == 1
        waiting = await place.ask()
        await asyncio.sleep(0.2)
        assert (endpoint.running, waiting.answer) == (0, None)
    assert len(await tokens(first)) == 100
    assert len(await tokens(waiting)) == 8


async def test_one_with_other_weights_than_it_is_to_have_is_not_used(
    make_place: MakePlace, sglang: Any
) -> None:
    place = await make_place()
    seen: list[dict] = []
    place.endpoints.on_other_weights = lambda _endpoint, info: seen.append(info)
    endpoint = place.add(sglang.url)
    await until(lambda: endpoint.healthy)
    endpoint.holds("weights/of/another", "version-2")
    await until(lambda: not endpoint.healthy)
    await until(lambda: seen)
    assert seen[0]["weight_version"] == "default"
    asked = await place.ask()
    await until(lambda: place.embedded == [asked])
    endpoint.holds(None, "default")
    await until(lambda: endpoint.healthy)
    assert len(await tokens(await place.ask())) == 8


async def test_one_of_another_model_is_not_used(make_place: MakePlace, sglang: Any, tmp_path: Path) -> None:
    place = await make_place()
    wrong = Registered(Endpoint(sglang.url), None, None)
    others = Endpoints({"other": BaseModel("other", tmp_path, None, 512, 320)})
    others.add(wrong)
    await wrong.checked.wait()
    await others.close()
    assert not wrong.healthy
    nobody = place.add("http://127.0.0.1:9")
    await nobody.checked.wait()
    assert not nobody.healthy
    asked = await place.ask()
    await until(lambda: place.embedded == [asked])


async def test_a_key_is_sent_and_never_told(proxy: Proxy) -> None:
    there = Endpoint(proxy.url, "sk-secret")
    assert (await there.model_info())["weight_version"] == "default"
    assert b"authorization: bearer sk-secret" in bytes(proxy.heard).lower()
    await there.close()
    client = Endpoint("http://127.0.0.1:9", "sk-secret")
    with pytest.raises(EndpointDied) as error:
        await client.model_info()
    assert "127.0.0.1:9" in error.value.message
    assert "sk-secret" not in error.value.message + repr(client)
    await client.close()


@pytest.mark.slow
async def test_a_real_death_and_another_start(make_place: MakePlace, sglang: Any) -> None:
    """kill -9 of SGLang in the middle of a sample, and a new one at the same place."""
    place = await make_place()
    alone = await make_place("sglang")
    endpoint, other = place.add(sglang.url), alone.add(sglang.url)
    await until(lambda: endpoint.healthy and other.healthy)
    asked, waiting = await place.ask(max_tokens=450), await alone.ask(max_tokens=450)
    await until(lambda: endpoint.running == other.running == 1)
    sglang.kill()
    await until(lambda: place.embedded == [asked])
    sglang.start()
    await until(lambda: endpoint.healthy, 60)
    assert endpoint.life == 2
    assert len(await tokens(waiting)) == 450
    assert len(await tokens(await place.ask())) == 8
