"""`kill -9` of the engine and of the server, and restarts, at random moments: clients carry on.

`TINSMITH_TEST_KILLS=50 pytest tests/conformance/test_kills.py -s` kills that often and prints the count.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tinker
from conformance.batches import batch, logprobs
from conformance.server_process import ServerProcess, Wire, datum
from tinker import types

KILLS = int(os.environ.get("TINSMITH_TEST_KILLS", "3"))
DEATHS = 3  # of an operation that is given up


class Killer:
    """Kills at random moments, and restarts, until it is told to stop, or has killed `limit` times."""

    def __init__(self, server: ServerProcess, limit: int, seed: int):
        self._server = server
        self._limit = limit
        self._random = random.Random(seed)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.kills: list[str] = []
        self.restarts = 0
        self.error: BaseException | None = None

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            while not (self.done or self._done.wait(self._random.uniform(0.2, 8))):
                if self.restarts < len(self.kills) // 2:
                    self._restart()
                elif self._kill(victim := ("engine", "server", "engine")[len(self.kills) % 3]):
                    self.kills.append(victim)
        except BaseException as error:
            self.error = error

    @property
    def done(self) -> bool:
        """Return True after all kills and restarts, or after an error."""
        all_of_them = len(self.kills) == self._limit and self.restarts == self._limit // 2
        return all_of_them or self.error is not None

    def _restart(self) -> None:
        assert self._server.stop() == 0, self._server.log
        self._server.start(wait_for_engine=False)
        self.restarts += 1

    def _kill(self, victim: str) -> bool:
        if victim == "engine":
            try:
                self._server.engine.kill()
            except (ValueError, psutil.NoSuchProcess):
                return False  # between two engines
            return True
        self._server.kill()  # the engine dies with it
        self._server.start(wait_for_engine=False)
        return True


PROMPT = [5, 6, 7]


def rewarded(sequence: types.SampledSequence) -> types.Datum:
    """Make a datum of a sample in which every even token is rewarded."""
    tokens = [*PROMPT, *sequence.tokens]
    before = len(PROMPT) - 1
    advantages = [1.0 if token % 2 == 0 else -1.0 for token in sequence.tokens]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": np.asarray([0.0] * before + list(sequence.logprobs), "float32").tolist(),
            "advantages": [0.0] * before + advantages,
        },
    )


def train(
    service: tinker.ServiceClient, steps: Callable[[], Iterator[int]]
) -> tuple[list[list[int]], np.ndarray, str]:
    """Train with SFT, and RL on its own samples in every third step. Return the samples, the final log-probs,
    and the weights' path."""
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=11).result()
    sampled = []
    for number in steps():
        if number % 3 == 2:
            policy = training.save_weights_and_get_sampling_client().result()
            params = types.SamplingParams(max_tokens=12, seed=number)
            drawn = policy.sample(types.ModelInput.from_ints(PROMPT), 2, params).result().sequences
            sampled += [sequence.tokens for sequence in drawn]
            done = training.forward_backward([rewarded(each) for each in drawn], "importance_sampling")
        else:
            done = training.forward_backward(batch(seed=number), "cross_entropy")
        stepped = training.optim_step(tinker.AdamParams(learning_rate=1e-2))
        assert np.isfinite(np.concatenate(logprobs(done.result()))).all()
        stepped.result()
    final = np.concatenate(logprobs(training.forward(batch(), "cross_entropy").result()))
    path = training.save_weights_for_sampler("final").result().path
    return sampled, final, path


def weights(server: ServerProcess, path: str) -> bytes:
    """Return the adapter's file on disk."""
    run, _, name = path.removeprefix("tinker://").split("/")
    folder = server.data_dir / "checkpoints" / run.replace(":", "@") / "sampler_weights"
    (file,) = folder.glob(f"{name}-*/adapter_model.safetensors")
    return file.read_bytes()


@pytest.mark.timeout(600 + 30 * KILLS)
def test_training_goes_on_through_random_kills(make_server) -> None:
    server: ServerProcess = make_server(
        TINSMITH_SNAPSHOT_OPERATIONS="7",
        TINSMITH_DEATHS_PER_OPERATION="1000",  # no operation is to blame
        TINSMITH_LONG_POLL_SECONDS="2",
    ).start()
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
    count = 9

    expected = train(service, lambda: iter(range(count)))
    with Killer(server, KILLS, seed=int(os.environ.get("TINSMITH_TEST_SEED", "1"))) as killer:

        def steps() -> Iterator[int]:
            """Yield the steps; the last one waits until all kills have been done."""
            for number in range(count):
                while number == count - 1 and not killer.done:
                    time.sleep(0.1)
                yield number

        survived = train(service, steps)
    print(f"\n{len(killer.kills)} kills: {', '.join(killer.kills)}; {killer.restarts} restarts")

    assert survived[0] == expected[0]
    np.testing.assert_array_equal(survived[1], expected[1])
    assert weights(server, survived[2]) == weights(server, expected[2])
    service.close("success").result()
    assert server.stop() == 0


@pytest.fixture(scope="module")
def mortal(make_server) -> ServerProcess:
    return make_server(TINSMITH_LONG_POLL_SECONDS="2", TINSMITH_DEATHS_PER_OPERATION=str(DEATHS)).start()


def under_way(engine: psutil.Process) -> str:
    """Return the operations that the engine computes at the moment."""
    for descriptor in Path(f"/proc/{engine.pid}/fd").iterdir():
        if descriptor.exists() and descriptor.resolve().name == "under_way":
            return descriptor.resolve().read_text().partition("\0")[0]
    return ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_an_operation_that_every_engine_dies_of_fails_alone(mortal: ServerProcess) -> None:
    wire = Wire(mortal.url, "tml-local")
    deadly, other, twin = wire.model(), wire.model(), wire.model()
    for model in (other, twin):
        wire.result(wire.forward_backward(model, 1))
    lives = mortal.health()["engine"]["lives"]
    long = [datum(tokens=[5 + i % 200] * 500, targets=[6] * 500) for i in range(64)]
    poison = wire.forward_backward(deadly, 1, long)
    after = wire.optim_step(deadly, 2, learning_rate=1e-2)
    beside = wire.optim_step(other, 2, learning_rate=1e-2)
    answered = threading.Event()

    def kill_when_it_runs() -> None:
        while not answered.is_set():
            try:
                engine = mortal.engine
                if poison.json()["request_id"] in under_way(engine):
                    engine.kill()
            except (ValueError, psutil.NoSuchProcess, OSError):
                pass  # between two engines
            time.sleep(0.002)

    watch = threading.Thread(target=kill_when_it_runs, daemon=True)
    watch.start()
    failed = wire.result(poison)
    answered.set()
    watch.join()

    assert failed["category"] == "server"
    assert f"{DEATHS} engines ended" in failed["error"]
    assert mortal.health()["engine"]["lives"] == lives + DEATHS
    assert "nothing to step with" in wire.result(after)["error"], "its gradients are missing"
    alone = wire.optim_step(twin, 2, learning_rate=1e-2)
    assert wire.result(beside)["metrics"] == wire.result(alone)["metrics"]
    assert "metrics" in wire.result(wire.forward_backward(deadly, 3))


def test_failures_are_replayed_too(mortal: ServerProcess) -> None:
    """A step after only failed gradients fails, in the next engine too."""
    wire = Wire(mortal.url, "tml-local")
    model = wire.model()
    assert wire.result(wire.forward_backward(model, 1, [datum(targets=[6, 7, 8, 100_000])]))["error"]
    mortal.engine.kill()
    assert "nothing to step with" in wire.result(wire.optim_step(model, 2))["error"]
