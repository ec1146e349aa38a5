"""Whole models on SGLang servers that fail, come back, or got them before our own restart."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tinsmith.engine import messages
from tinsmith.server.plugins.sglang.endpoint import Endpoint
from tinsmith.server.plugins.sglang.endpoints import Registered
from tinsmith.server.plugins.sglang.merged_weights import Synced
from tiny_models import write_model

from .place import PROMPT, MakePlace, Place, tokens, until
from .proxy import Proxy
from .sglang_process import SglangProcess

torch = pytest.importorskip("torch")

KEY = "checkpoints/run/sampler_weights/one-1"


def greedy(folder: Path) -> list[int]:
    """Return what transformers draws from the folder's model."""
    from transformers import AutoModelForCausalLM

    model, drawn = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), list(PROMPT)
    with torch.no_grad():
        for _ in range(8):
            drawn.append(int(model(torch.tensor([drawn])).logits[0, -1].argmax()))
    return drawn[len(PROMPT) :]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("trained") / "model", "llama", seed=7)


@pytest.fixture(scope="module")
def expected(sglang: SglangProcess, trained: Path) -> tuple[list[int], list[int]]:
    """The expected tokens of the base model and of the trained one."""
    base, other = greedy(sglang.model), greedy(trained)
    assert base != other
    return base, other


@pytest.fixture(autouse=True)
async def as_at_its_start(sglang: SglangProcess) -> AsyncIterator[None]:
    yield
    sglang.reset_weights()


def save(place: Place, trained: Path) -> messages.SamplerRef:
    """Write full weights to where a save would have written them."""
    shutil.copytree(trained, place.data_dir / KEY)
    return messages.SamplerRef("tiny", KEY)


async def sync(place: Place, sampler: messages.SamplerRef, *servers: Registered) -> Synced:
    await until(lambda: all(each.healthy for each in servers))
    return await place.distribution.merged.sync(sampler, list(servers))


async def test_new_weights_that_find_a_request_there_are_flushed_in_when_it_has_ended(
    sglang: SglangProcess, trained: Path
) -> None:
    """SGLang answers 400 in that case, although it has the weights, and also if the request has just
    ended."""
    client = Endpoint(sglang.url)
    sampling = {"max_new_tokens": 200, "ignore_eos": True}
    running = asyncio.ensure_future(client.generate({"input_ids": [*PROMPT], "sampling_params": sampling}))
    await asyncio.sleep(0.2)
    await client.pause_generation("in_place")
    update = asyncio.ensure_future(client.update_weights_from_disk(str(trained), "other"))
    try:
        await asyncio.sleep(0.5)
        assert not update.done()
    finally:
        await client.continue_generation()
    assert (await update)["success"]
    await running
    assert (await client.model_info())["weight_version"] == "other"
    await client.close()


async def test_new_weights_under_the_old_name_are_not_used(
    make_place: MakePlace, sglang: SglangProcess, proxy: Proxy, trained: Path, expected: Any
) -> None:
    """The only server of a sync takes them, but its connection is cut before it says so: it has other weights
    now."""
    place = await make_place()
    endpoint = place.add(proxy.url)
    await until(lambda: endpoint.healthy)
    others = Endpoint(sglang.url)
    sampling = {"max_new_tokens": 200, "ignore_eos": True}
    running = asyncio.ensure_future(others.generate({"input_ids": [*PROMPT], "sampling_params": sampling}))
    await asyncio.sleep(0.2)
    await others.pause_generation("in_place")
    proxy.cut_at = b"/flush_cache"
    try:
        synced = await sync(place, save(place, trained), endpoint)
    finally:
        await others.continue_generation()
    await running
    await others.close()
    assert not synced.success
    assert sglang.weight_version == "default"
    proxy.cut_at = None
    await proxy.open()
    await until(lambda: endpoint.healthy)
    of_base = await place.ask()
    await until(lambda: place.embedded == [of_base])
    assert await tokens(await place.ask(weights=KEY)) == expected[1]


async def test_a_server_that_comes_back_with_its_own_model_is_given_the_other_again(
    make_place: MakePlace, sglang: SglangProcess, proxy: Proxy, trained: Path, expected: Any
) -> None:
    place = await make_place("sglang")
    endpoint = place.add(proxy.url)
    sampler = save(place, trained)
    synced = await sync(place, sampler, endpoint)
    assert synced.success, synced
    assert await tokens(await place.ask(weights=KEY)) == expected[1]
    proxy.kill()
    await until(lambda: not endpoint.healthy)
    sglang.reset_weights()
    await proxy.open()
    asked = await place.ask(weights=KEY)
    assert await tokens(asked) == expected[1]
    assert sglang.weight_version == synced.version
    assert endpoint.life > 1
    assert place.embedded == []


async def test_the_next_start_knows_what_a_server_was_given(
    make_place: MakePlace, sglang: SglangProcess, trained: Path, expected: Any
) -> None:
    place = await make_place()
    assert (await sync(place, save(place, trained), place.add(sglang.url))).success
    await place.endpoints.close()
    next_start = await make_place(data_dir=place.data_dir)
    endpoint = next_start.add(sglang.url)
    await until(lambda: endpoint.healthy)
    assert endpoint.weights == KEY
    assert await tokens(await next_start.ask(weights=KEY)) == expected[1]
    of_base = await next_start.ask()
    await until(lambda: next_start.embedded == [of_base])


async def test_a_sample_begun_with_other_weights_is_drawn_anew(
    make_place: MakePlace, sglang: SglangProcess, trained: Path, expected: Any
) -> None:
    """The same server is registered twice. Through one name it gets new weights, while a sample through the
    other has chosen its weights and is not sent yet. The change is noticed when the answer arrives."""
    place = await make_place()
    operator, own = place.add(sglang.url), place.add(f"http://localhost:{sglang.port}")
    await until(lambda: operator.healthy and own.healthy)
    await place.endpoints.remove(own)
    generate = operator.client.generate

    async def after_a_sync(body: dict[str, Any]) -> list[dict[str, Any]]:
        sampler = save(place, trained)
        own = place.add(f"http://localhost:{sglang.port}")
        assert (await sync(place, sampler, own)).success
        answers = await generate(body)
        await place.endpoints.remove(own)
        await until(lambda: operator.weights == KEY)
        return answers

    operator.client.generate = after_a_sync  # type: ignore[method-assign]
    of_base = await place.ask()
    await until(lambda: place.embedded == [of_base])
    operator.client.generate = generate  # type: ignore[method-assign]
    await until(lambda: operator.healthy)
    assert await tokens(await place.ask(weights=KEY)) == expected[1]


async def test_a_name_is_of_one_version_s_weights(
    make_place: MakePlace, sglang: SglangProcess, trained: Path, tmp_path: Path, expected: Any
) -> None:
    """Such a name is `latest`, given at each step, or that of the server's first model."""
    place = await make_place()
    endpoint = place.add(sglang.url)
    sampler, other = save(place, trained), messages.SamplerRef("tiny", KEY.replace("one", "two"))
    assert other.weights is not None
    shutil.copytree(write_model(tmp_path / "other", "llama", seed=8), place.data_dir / other.weights)
    merged, names = place.distribution.merged, []
    await until(lambda: endpoint.healthy)
    for weights, name in ((sampler, "latest"), (other, "latest"), (sampler, "latest"), (other, "default")):
        synced = await merged.sync(weights, [endpoint], version=name)
        assert synced.success
        assert sglang.weight_version == synced.version
        names.append(synced.version)
        await until(lambda: endpoint.healthy)
    assert names == ["latest", "latest.2", "latest", "default.2"]


async def test_when_no_server_takes_new_weights_all_go_on_with_theirs(
    make_place: MakePlace, sglang: SglangProcess, tmp_path: Path, trained: Path, expected: Any
) -> None:
    """The servers cannot find the volume under the given path."""
    place = await make_place(sglang_data_dir=tmp_path / "elsewhere")
    endpoint = place.add(sglang.url)
    synced = await sync(place, save(place, trained), endpoint)
    assert not synced.success
    assert str(tmp_path / "elsewhere") in synced.pushed[0].problem
    await until(lambda: endpoint.healthy)
    assert sglang.weight_version == "default"
    assert await tokens(await place.ask()) == expected[0]
    of_new = await place.ask(weights=KEY)
    await until(lambda: place.embedded == [of_new])


async def in_a_pool_of_which_one_fails(
    place: Place, sampler: messages.SamplerRef, good: Registered, failing: Registered, expected: Any
) -> None:
    synced = await sync(place, sampler, good, failing)
    assert [each.problem is None for each in synced.pushed] == [True, False]
    assert not failing.healthy
    assert await tokens(await place.ask(weights=KEY)) == expected[1]
    assert (good.answered, failing.answered) == (1, 0)
    of_base = await place.ask()
    await until(lambda: place.embedded == [of_base])


async def test_only_servers_of_a_pool_that_took_the_weights_are_used(
    make_place: MakePlace, sglang: SglangProcess, proxy: Proxy, trained: Path, expected: Any
) -> None:
    place = await make_place()
    good, failing = place.add(sglang.url), place.add(proxy.url)
    proxy.cut_at = b"/update_weights_from_disk"
    await in_a_pool_of_which_one_fails(place, save(place, trained), good, failing, expected)


@pytest.mark.slow
async def test_a_server_that_dies_of_a_sync_is_given_the_weights_at_its_next_start(
    make_place: MakePlace,
    sglang: SglangProcess,
    sglang_python: Path,
    tmp_path: Path,
    trained: Path,
    expected: Any,
) -> None:
    """There are two real servers; neither draws from the older weights meanwhile."""
    other = SglangProcess(sglang_python, sglang.model, tmp_path / "log").start()
    try:
        proxy = Proxy(other.port)
        await proxy.open()
        place = await make_place()
        good, failing = place.add(sglang.url), place.add(proxy.url)
        proxy.cut_at = b"/update_weights_from_disk"
        await in_a_pool_of_which_one_fails(place, save(place, trained), good, failing, expected)
        other.restart()
        proxy.cut_at = None
        await proxy.open()
        await until(lambda: failing.healthy)
        assert other.weight_version == sglang.weight_version == good.weight_version
        await place.endpoints.remove(good)
        assert await tokens(await place.ask(weights=KEY)) == expected[1]
        assert failing.answered == 1
    finally:
        proxy.kill()
        other.stop()
