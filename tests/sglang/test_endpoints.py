"""Servers that come, go and come back, and what becomes of the samples that they were drawing."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinsmith.engine import messages
from tinsmith.server.base_models import BaseModel
from tinsmith.server.plugins.sglang.endpoint import Endpoint, EndpointDied
from tinsmith.server.plugins.sglang.endpoints import Endpoints, Registered

from .place import MakePlace, tokens, until
from .proxy import Proxy

LONG = 120  # tokens: more than a second


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
    assert "api_key" not in repr(endpoint.limits)
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


async def test_operations_that_a_stopped_server_had_not_answered_are_done_by_the_next(
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
    place.endpoints.other_weights.subscribe(lambda _endpoint, info: seen.append(info))
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
