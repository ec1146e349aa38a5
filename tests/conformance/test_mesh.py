"""`tinsmith serve --mesh … --full-weight`: what the SDK gets is what one device gives."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import tinker
from conformance.batches import batch, logprobs
from conformance.server_process import ServerProcess
from tinker import types

EIGHT_DEVICES = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
PARAMS = {"adamw": types.AdamParams, "dimuon": types.DimuonParams}
CONFIGS = {"adamw": types.AdamOptimizerConfig(), "dimuon": types.DimuonOptimizerConfig()}


def train(server: ServerProcess, rank: int, optimizer: str) -> tuple[list[np.ndarray], list[int], np.ndarray]:
    """Two steps and a restored checkpoint: log-probs of every pass, a greedy sample and its log-probs."""
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-any")
    training = service.create_lora_training_client(
        base_model="tiny", rank=rank, seed=3, optimizer=CONFIGS[optimizer]
    ).result()
    data, seen = batch(6), []
    for _ in range(2):
        seen += logprobs(training.forward_backward(data, "cross_entropy").result())
        training.optim_step(PARAMS[optimizer](learning_rate=1e-2)).result()
    path = training.save_state("after-two").result().path
    sampling = training.save_weights_and_get_sampling_client().result()
    training.forward_backward(data, "cross_entropy").result()
    training.optim_step(PARAMS[optimizer](learning_rate=1e-1)).result()
    training.load_state(path).result()
    seen += logprobs(training.forward(data, "cross_entropy").result())
    prompt = types.ModelInput.from_ints([5, 6, 7])
    params = types.SamplingParams(max_tokens=8, temperature=0.0)
    (sample,) = sampling.sample(prompt, num_samples=1, sampling_params=params).result().sequences
    return seen, sample.tokens, np.array(sample.logprobs)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "optimizer"), [(4, "adamw"), (0, "adamw"), (4, "dimuon"), (0, "dimuon")])
def test_a_mesh_gives_one_devices_results(
    servers: tuple[ServerProcess, ServerProcess], rank: int, optimizer: str
) -> None:
    one, meshed = (train(server, rank, optimizer) for server in servers)
    for row, other in zip(one[0], meshed[0], strict=True):
        np.testing.assert_allclose(row, other, atol=1e-4)
    assert one[1] == meshed[1]
    np.testing.assert_allclose(one[2], meshed[2], atol=1e-4)
    first, second, restored = (one[0][at : at + 6] for at in (0, 6, 12))
    assert any(np.abs(a - b).max() > 1e-2 for a, b in zip(first, second, strict=True))  # it learnt
    assert any(np.abs(a - b).max() > 1e-2 for a, b in zip(second, restored, strict=True))


@pytest.fixture(scope="module")
def servers(make_server: Callable[..., ServerProcess]) -> tuple[ServerProcess, ServerProcess]:
    one = make_server("--full-weight").start()
    meshed = make_server("--full-weight", "--mesh", "data=2,fsdp=2,tensor=2", **EIGHT_DEVICES).start()
    assert "on 8 x cpu" in meshed.log
    return one, meshed
