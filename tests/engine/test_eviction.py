"""An engine whose budget is too small for two models gives the same answers as one with room for all."""

from __future__ import annotations

import queue

import numpy as np
import pytest
from tinsmith.engine import base_models, compilation, messages
from tinsmith.engine.loop import Engine
from tinsmith.engine.tenants import Tenants
from tinsmith.model.sharding import make_mesh

from tests.engine.engine_client import CACHE, datum, lora
from tests.tiny_models import write_model

MODELS = "abc"


class Inbox:
    """A socket whose other end is a list."""

    def __init__(self, requests):
        self.inbox = queue.SimpleQueue()
        self.answers = {}
        for request in requests:
            self.inbox.put(request)

    def send(self, message):
        if isinstance(message, messages.Done | messages.Failed):
            assert message.request_id not in self.answers
            self.answers[message.request_id] = message

    def post(self, event):
        self.inbox.put(event)


def requests(run: str) -> list[messages.ToEngine]:
    """Three models train by turns, are saved, sampled, put to sleep, trained on, loaded and deleted."""
    sent: list[messages.ToEngine] = [
        messages.CreateModel(f"create {name}", name, "tiny", lora(seed=seed))
        for seed, name in enumerate(MODELS)
    ]
    adam = messages.AdamParams(learning_rate=1e-2)
    for turn in range(3):
        for seed, name in enumerate(MODELS):
            data = [datum(20, 10 * turn + seed), datum(40, seed)]
            sent.append(messages.ForwardBackward(f"train {name} {turn}", name, data, "cross_entropy"))
            sent.append(messages.OptimStep(f"step {name} {turn}", name, adam))
        if turn == 0:
            for name in MODELS:
                sent.append(messages.SaveState(f"save {name}", name, f"{run}/{name}/state"))
                sent.append(
                    messages.SaveSampler(f"freeze {name}", name, f"{run}/{name}/sampler", deferred=True)
                )
        if turn == 1:
            sent.append(messages.Sleep("sleep"))
    for name in MODELS:
        sampler = messages.SamplerRef("tiny", f"{run}/{name}/sampler")
        prompt = np.arange(5, 15, dtype="<i4").tobytes()
        params = messages.SamplingParams(max_tokens=4, seed=1)
        sent.append(messages.Sample(f"sample {name}", sampler, prompt, 1, params))
        sent.append(messages.LoadState(f"load {name}", name, f"{run}/{name}/state", optimizer_state=True))
        sent.append(messages.ForwardBackward(f"again {name}", name, [datum(30, 7)], "cross_entropy"))
        sent.append(messages.DeleteModel(f"delete {name}", name))
    return [*sent, messages.Stop("stop")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eviction")
    compilation.use_cache(CACHE)
    config = messages.EngineConfig(
        "", str(folder / "data"), str(CACHE), [messages.BaseModel("tiny", str(write_model(folder / "model")))]
    )
    return config, base_models.load(config.base_models[0], config, make_mesh())


def run(base, name: str, budget: int | None) -> dict:
    """Answer all requests with an engine of its own; with a `budget` states leave as on an accelerator."""
    config, model = base
    socket = Inbox(requests(name))
    engine = Engine(config, {"tiny": model}, socket)
    before = model.memory.budget.max_bytes
    if budget is not None:
        model.memory.budget.max_bytes = budget
        engine._models._tenants.may_leave = True
    try:
        engine.run()
    finally:
        model.memory.budget.max_bytes = before
    return socket.answers


def test_states_that_come_and_go_change_no_answer(base, monkeypatch):
    left = []
    drop_oldest = Tenants.drop_oldest
    monkeypatch.setattr(Tenants, "drop_oldest", lambda self: (left.append(1), drop_oldest(self)))
    expected = run(base, "roomy", None)
    assert not left
    got = run(base, "tight", 1)
    assert len(left) > 2 * len(MODELS)
    for request_id, answer in expected.items():
        assert isinstance(answer, messages.Done), answer
        other = got[request_id]
        assert isinstance(other, messages.Done), other
        # What has left differs, and so do the sizes of compressed files.
        if not isinstance(answer.output, messages.Slept | messages.StateSaved):
            assert other.output == answer.output, request_id
