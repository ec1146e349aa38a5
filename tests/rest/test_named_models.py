"""Models that their clients name outlive the server, as all do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conformance.server_process import ServerProcess
from rest.clients import ALICE, Xorl
from rest.test_xorl import BATCH
from tiny_models import write_model

MODEL = {"model_id": "kept"}


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[ServerProcess]:
    write_model(tmp_path / "tiny", "llama")
    cache = Path(__file__).parents[2] / ".cache" / "tests" / "servers"
    running = ServerProcess(
        tmp_path / "tiny",
        tmp_path / "data",
        cache,
        *("--api-key", f"alice={ALICE}"),
        TINSMITH_LONG_POLL_SECONDS="5",
    )
    yield running.start()
    running.kill()


def steps(client: Xorl, first: int, count: int) -> list[float]:
    """Losses of steps that are numbered from `first` on."""
    losses = []
    for number in range(first, first + 2 * count, 2):
        trained = client.done("forward_backward", seq_id=number, forward_backward_input=BATCH, **MODEL)
        client.done("optim_step", seq_id=number + 1, learning_rate=0.02, **MODEL)
        losses.append(trained["metrics"]["loss:mean"])
    return losses


@pytest.mark.slow
def test_a_named_model_goes_on_after_a_kill_and_its_numbers_begin_again_when_it_is_opened(
    own_server: ServerProcess,
) -> None:
    asked = {"base_model": "tiny", "lora_config": {"rank": 4, "seed": 2}}
    with Xorl(own_server.url, ALICE) as client:
        client.done("create_model", **asked, **MODEL)
        losses = steps(client, 1, 2)
        client.done("create_model", **asked, **MODEL)
        losses += steps(client, 1, 2)
        last = client.ask("forward", seq_id=5, forward_input=BATCH, **MODEL)["request_id"]
        first = client.poll(last)
        own_server.kill()
        own_server.start()
        assert client.poll(last) == first, "the answer that was given stays the answer"
        losses += steps(client, 6, 2)
        client.done("create_model", **asked, **MODEL)
        losses += steps(client, 1, 1)
        again = {"model_id": "alone"}
        client.done("create_model", **asked, **again)
        undisturbed = []
        for _ in losses:
            trained = client.done("forward_backward", forward_backward_input=BATCH, **again)
            client.done("optim_step", learning_rate=0.02, **again)
            undisturbed.append(trained["metrics"]["loss:mean"])
    assert losses == pytest.approx(undisturbed, rel=1e-5)
