"""Trained weights are sampled on SGLang, version by version, through the unmodified SDK."""

from __future__ import annotations

import httpx
import pytest
import tinker
from conformance.browser import give_key, needs_chromium, running_browser, tab
from conformance.conftest import ALICE
from conformance.server_process import ServerProcess, Wire
from scraper import Scraper, of_sglang
from tinker import types

from .rollouts import DRAWN, GREEDY, PROMPTS, drawn_there, is_up, sampled, step, texts, until
from .sglang_process import SglangProcess


def test_an_rl_loop_of_two_models_draws_on_sglang(
    tinsmith: ServerProcess, service: tinker.ServiceClient, alice: Wire
) -> None:
    """Three versions of each, and the base model: log-probs are the trainer's, and all of them differ."""
    until(lambda: is_up(alice))
    before = drawn_there(alice)
    models = [
        service.create_lora_training_client(base_model="tiny", rank=rank, seed=rank).result()
        for rank in (4, 8)
    ]
    base = service.create_sampling_client(base_model="tiny").result()
    plain = texts(sampled(base, GREEDY))
    said: list[list[list[list[int]]]] = [[], []]
    for version in range(3):
        for model, told in zip(models, said, strict=True):
            path = model.save_weights_for_sampler(f"v{version}").result().path
            sampler = service.create_sampling_client(model_path=path).result()
            told.append(texts(sampled(sampler, GREEDY)))
            assert step(model, sampled(sampler, DRAWN, 4)) <= 1e-4
        assert texts(sampled(base, GREEDY)) == plain
    for told in said:
        assert told[0] == plain, "a fresh adapter changes nothing"
        assert told[1] != told[0]
        assert told[2] != told[1]
    assert said[0][2] != said[1][2]
    # Of each version four samples (two prompts, twice), of the base model eight: all were drawn there.
    assert drawn_there(alice) - before == 2 * 3 * 4 + 8


def test_unnamed_weights_are_drawn_on_sglang_at_once(
    tinsmith: ServerProcess, service: tinker.ServiceClient, sglang: SglangProcess, alice: Wire
) -> None:
    """And more versions than it has room for: an older one comes back when it is asked for."""
    until(lambda: is_up(alice))
    model = service.create_lora_training_client(base_model="tiny", rank=4, seed=1).result()
    before = drawn_there(alice)
    samplers, told = [], []
    for _ in range(8):
        samplers.append(model.save_weights_and_get_sampling_client().result())
        told.append(texts(sampled(samplers[-1], GREEDY)))
        assert step(model, sampled(samplers[-1], DRAWN, 2)) <= 1e-4
    assert texts(sampled(samplers[1], GREEDY)) == told[1]
    assert told[1] != told[7]
    assert drawn_there(alice) - before == 8 * 4 + 2
    loaded = httpx.get(f"{sglang.url}/v1/models").json()["data"]
    assert len([each for each in loaded if each.get("parent")]) <= 6


def test_a_loop_finishes_though_sglang_is_killed_and_comes_back(
    tinsmith: ServerProcess, service: tinker.ServiceClient, sglang: SglangProcess, alice: Wire
) -> None:
    """And the metrics about SGLang, all of which docs/metrics.md has, move meanwhile."""
    until(lambda: is_up(alice))
    scraper = Scraper(tinsmith.url, ALICE)
    scraper.scrape()
    model = service.create_lora_training_client(base_model="tiny", rank=4, seed=2).result()
    for version in range(4):
        path = model.save_weights_for_sampler(f"v{version}").result().path
        sampler = service.create_sampling_client(model_path=path).result()
        if version == 1:
            futures = [
                sampler.sample(types.ModelInput.from_ints(PROMPTS[0]), 4, sampling_params=DRAWN)
                for _ in range(8)
            ]
            sglang.kill()
            assert all(len(future.result().sequences) == 4 for future in futures)
            assert not is_up(alice)
            scraper.scrape()
        if version == 3:
            sglang.start()
            until(lambda: is_up(alice))
            before = drawn_there(alice)
        assert step(model, sampled(sampler, DRAWN, 2)) <= 1e-4
    assert drawn_there(alice) - before == 2, "what was saved meanwhile is there again"
    until(lambda: scraper.scrape() and of_sglang() <= scraper.moved())


@pytest.fixture
def own(tinsmith: ServerProcess, sglang: SglangProcess, alice: Wire):
    """The same server once more, as alice's own: others' are not hers to change."""
    added = alice.http.post("/add_inference_endpoint", json={"host": "localhost", "port": sglang.port})
    assert added.json()["success"], added.text
    yield
    given = alice.post("sync_inference_weights", base_model="tiny").json()
    assert given["success"], given
    alice.http.post("/remove_inference_endpoint", json={"host": "localhost", "port": sglang.port})


@needs_chromium
def test_the_console_shows_a_tenant_s_server(
    tinsmith: ServerProcess, sglang: SglangProcess, own: None
) -> None:
    with running_browser() as browser, tab(browser, tinsmith.url) as page:
        give_key(page, ALICE)
        page.goto("/samplers")
        row = page.locator(f"tr:has-text('localhost:{sglang.port}')")
        row.wait_for()
        assert row.locator("td").nth(1).inner_text() == "healthy"
        assert row.locator("td").nth(2).inner_text() == "tiny"
        assert "The operator has registered 1; 1 of them are healthy." in page.inner_text("main")


def test_whole_models_replace_each_other_on_sglang(
    tinsmith: ServerProcess, service: tinker.ServiceClient, sglang: SglangProcess, alice: Wire, own: None
) -> None:
    """A model's newest weights, a saved version's, and at last the base model's."""
    model = service.create_lora_training_client(
        base_model="tiny", rank=4, seed=3, train_unembed=False
    ).result()
    base = service.create_sampling_client(base_model="tiny").result()
    plain = texts(sampled(base, GREEDY))
    step(model, sampled(base, DRAWN, 4))
    path = model.save_weights_for_sampler("one").result().path
    sampler = service.create_sampling_client(model_path=path).result()
    synced = alice.post("sync_inference_weights", model_path=path, weight_version="one").json()
    assert synced["success"], synced
    (there,) = synced["endpoints_synced"]
    assert there["seconds"]["loaded"] > 0
    assert synced["timing_breakdown"].keys() == {"save", "export", "check", "push"}
    assert synced["num_parameters"] > 10_000
    assert synced["total_bytes"] >= 4 * synced["num_parameters"]
    assert sglang.weight_version == "one"
    before = drawn_there(alice)
    assert step(model, sampled(sampler, DRAWN, 4)) <= 1e-4
    assert drawn_there(alice) - before == 2
    assert texts(sampled(sampler, GREEDY)) != plain
    before = drawn_there(alice)
    assert texts(sampled(base, GREEDY)) == plain, "which it has not any more"
    assert drawn_there(alice) == before
    newest = alice.post("sync_inference_weights", model_id=model.model_id, pause_mode="abort").json()
    assert newest["success"], newest
    assert newest["weight_version"] != "one"


def test_weights_that_sglang_would_not_survive_are_not_sent(
    tinsmith: ServerProcess, service: tinker.ServiceClient, sglang: SglangProcess, alice: Wire, own: None
) -> None:
    """An unembedding of its own where the server's is tied, and float8 that it was not started in."""
    model = service.create_lora_training_client(base_model="tiny", rank=4, seed=3).result()
    before = sglang.weight_version
    for body, reason in (
        ({}, "shares with the embedding"),
        ({"quantization": {"quant_method": "fp8"}}, "was started in"),
    ):
        answer = alice.post("sync_inference_weights", model_id=model.model_id, **body).json()
        assert not answer["success"]
        assert reason in answer["endpoints_synced"][0]["message"]
    assert sglang.weight_version == before
