"""`tinsmith serve --sglang-merge`: saved weights replace those of the tenant's SGLang servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import tinker
from conformance.server_process import ServerProcess, Wire

from .conftest import ALICE, TENANTS
from .rollouts import DRAWN, GREEDY, drawn_there, is_up, sampled, step, texts, until
from .sglang_process import SglangProcess


@pytest.fixture
def merging(make_tinsmith: Callable[..., ServerProcess], sglang: SglangProcess) -> Iterator[ServerProcess]:
    """A server with one tenant, so that the operator's SGLang servers are that tenant's own."""
    server = make_tinsmith("--sglang-merge", "--full-weight", tenants=TENANTS[:1]).start()
    yield server
    server.kill()
    sglang.reset_weights()


@pytest.mark.slow
def test_saved_weights_replace_those_of_a_server(merging: ServerProcess, sglang: SglangProcess) -> None:
    """The weights are an adapter merged into its base model, and full weights; both are still known after a
    restart."""
    alice = Wire(merging.url, ALICE)
    service = tinker.ServiceClient(base_url=merging.url, api_key=ALICE)
    until(lambda: is_up(alice))
    base = service.create_sampling_client(base_model="tiny").result()
    told, versions = [texts(sampled(base, GREEDY))], {sglang.weight_version}
    assert drawn_there(alice) == 2
    for rank in (4, 0):
        model = service.create_lora_training_client(
            base_model="tiny", rank=rank, seed=3, train_unembed=False
        ).result()
        step(model, sampled(base, DRAWN, 4))
        drawn = drawn_there(alice)
        path = model.save_weights_for_sampler("one").result().path
        until(lambda: sglang.weight_version not in versions and is_up(alice))
        versions.add(sglang.weight_version)
        sampler = service.create_sampling_client(model_path=path).result()
        assert step(model, sampled(sampler, DRAWN, 4)) <= 1e-4
        told.append(texts(sampled(sampler, GREEDY)))
        assert drawn_there(alice) == drawn + 4
    assert told[0] != told[1] != told[2] != told[0]
    service.close("success").result()
    assert merging.stop() == 0
    merging.start()
    until(lambda: is_up(alice))
    after = tinker.ServiceClient(base_url=merging.url, api_key=ALICE)
    assert texts(sampled(after.create_sampling_client(model_path=path).result(), GREEDY)) == told[2]
    assert drawn_there(alice) == 2
    assert texts(sampled(after.create_sampling_client(base_model="tiny").result(), GREEDY)) == told[0]
    assert drawn_there(alice) == 2, "the engine's"
    after.close("success").result()
