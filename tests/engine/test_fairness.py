"""The policy by which training and sampling share the device: a turn each."""

import queue

import numpy as np
import pytest
from tinsmith.engine import base_models, compilation, messages
from tinsmith.engine.loop import Engine
from tinsmith.engine.sampling.sampler import Sampler
from tinsmith.engine.training.device_batch import DeviceBatch
from tinsmith.model.sharding import make_mesh

from tests.engine.engine_client import CACHE, datum, lora
from tests.tiny_models import write_model


class Inbox:
    """A socket whose other end is a list."""

    def __init__(self, requests):
        self.inbox = queue.SimpleQueue()
        self.sent = []
        for request in requests:
            self.inbox.put(request)

    def send(self, message):
        self.sent.append(message)


def long_training(request_id, model_id):
    data = [datum(500, seed) for seed in range(24)]
    return messages.ForwardBackward(request_id, model_id, data, "cross_entropy")


def long_sample(request_id, prompt_length, num_samples=1):
    prompt = np.arange(5, 5 + prompt_length, dtype="<i4") % 300
    params = messages.SamplingParams(max_tokens=200, stop_tokens=[])
    return messages.Sample(request_id, messages.SamplerRef("tiny"), prompt.tobytes(), num_samples, params)


@pytest.fixture
def turns(tmp_path, monkeypatch):
    """Runs requests to the end; the turns in order: t for a micro-batch, s for a prefill or decode chunk."""
    compilation.use_cache(CACHE)
    folder = write_model(tmp_path / "model", max_position_embeddings=2048)
    config = messages.EngineConfig(
        "",
        str(tmp_path / "data"),
        str(CACHE),
        [messages.BaseModel("tiny", str(folder))],
        kv_cache_tokens=8192,
        under_way=str(tmp_path / "under_way"),
    )
    base = base_models.load(config.base_models[0], config, make_mesh())
    taken, under_way = [], {"t": set(), "s": set()}

    def noted(letter, step):
        def wrapped(self, *arguments):
            taken.append(letter)
            answers = step(self, *arguments)
            lines = (tmp_path / "under_way").read_text().partition("\0")[0].splitlines()
            under_way[letter].update(line.partition("\t")[0] for line in lines)
            return answers

        return wrapped

    monkeypatch.setattr(DeviceBatch, "step", noted("t", DeviceBatch.step))
    monkeypatch.setattr(Sampler, "step", noted("s", Sampler.step))

    def run(*requests):
        socket = Inbox([*requests, messages.Stop("stop")])
        Engine(config, {"tiny": base}, socket).run()
        failed = [answer for answer in socket.sent if isinstance(answer, messages.Failed)]
        assert not failed
        for letter, kind in (("t", messages.ForwardBackward), ("s", messages.Sample)):
            asked = {request.request_id for request in requests if isinstance(request, kind)}
            assert under_way[letter] == asked, "it is noted of what the engine would have died"
        return "".join(taken)

    return run


def test_neither_training_nor_sampling_waits_for_more_than_one_turn_of_the_other(turns):
    """However many models train, and however long prompts and samples are."""
    taken = turns(
        *(messages.CreateModel(f"create-{name}", name, "tiny", lora()) for name in "ab"),
        long_sample("short prompt", 10, num_samples=4),
        *(long_training(f"train-{name}", name) for name in "ab"),
        long_sample("long prompt", 1500),
    )
    both = taken[taken.index("t") : min(taken.rindex("t"), taken.rindex("s"))]
    assert "tt" not in both, taken
    assert "ss" not in both, taken
    assert both.count("s") >= 6, taken
