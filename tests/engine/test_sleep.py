"""Sleep: everything that leaves the device comes back bit for bit, and requests meanwhile are answered."""

import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tinsmith.engine import messages
from tinsmith.engine.measurements import REPORT_SECONDS

from tests.engine.engine_client import EngineClient, datum, logprobs, lora
from tests.tiny_models import write_model

ADAM = messages.AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", "llama")


@pytest.fixture(scope="module")
def engine(model_folder, tmp_path_factory):
    running = EngineClient(tmp_path_factory.mktemp("engine"), model_folder, full_weight=True)
    yield running
    assert running.stop() == 0


def step(engine, model, seed):
    engine.ask(messages.ForwardBackward, model_id=model, data=[datum(9, seed)], loss_fn="cross_entropy")
    engine.ask(messages.OptimStep, model_id=model, params=ADAM)


def saved(engine, model, name):
    engine.ask(messages.SaveState, model_id=model, directory=name)
    directory = engine.folder / "data" / name
    with ocp.PyTreeCheckpointer() as reader:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(reader.restore(directory / "arrays"))]


def sample(engine, weights=None):
    return {
        "sampler": messages.SamplerRef("tiny", weights=weights),
        "prompt": np.arange(3, 9, dtype="<i4").tobytes(),
        "num_samples": 1,
        "params": messages.SamplingParams(max_tokens=4, seed=1),
    }


def test_it_sleeps_and_wakes_bit_for_bit(engine):
    """An adapter and full weights, with moments and accumulated gradients; sampler weights in memory."""
    engine.ask(messages.CreateModel, model_id="a", base_model="tiny", lora=lora())
    engine.ask(messages.CreateModel, model_id="f", base_model="tiny", lora=None, optimizer="muon")
    for model in ("a", "f"):
        step(engine, model, 1)
        engine.ask(messages.ForwardBackward, model_id=model, data=[datum(7, 2)], loss_fn="cross_entropy")
        engine.ask(messages.SaveSampler, model_id=model, directory=f"samplers/{model}/1", deferred=True)
    before = {model: saved(engine, model, f"before/{model}") for model in ("a", "f")}
    sampled = {key: engine.ask(messages.Sample, **sample(engine, key)) for key in (None, "samplers/f/1")}
    slept = engine.ask(messages.Sleep)
    states = sum(leaf.nbytes for model in before.values() for leaf in model)
    assert states < slept.bytes  # the base model's weights too
    assert slept.bytes_on_device < 1e-3 * slept.bytes
    assert engine.ask(messages.Sleep).bytes == 0  # it sleeps already
    woken = engine.ask(messages.WakeUp)
    assert woken.bytes == slept.bytes <= woken.bytes_on_device
    assert engine.ask(messages.WakeUp).bytes == 0
    for model in ("a", "f"):
        after = saved(engine, model, f"after/{model}")
        for one, other in zip(before[model], after, strict=True):
            np.testing.assert_array_equal(one, other)
    for key, want in sampled.items():
        assert engine.ask(messages.Sample, **sample(engine, key)).sequences == want.sequences


def test_it_goes_on_reporting_while_it_sleeps(engine):
    engine.ask(messages.Sleep)
    time.sleep(REPORT_SECONDS + 0.2)
    for _ in range(3):  # the first is news, of which the next look reports
        assert engine.ask(messages.Sleep).bytes == 0
    engine.ask(messages.WakeUp)


def test_requests_during_a_sleep_wake_it(engine):
    """Everything sent in one go, before and after the sleep: each is done, in order."""
    for model in ("w", "v"):
        engine.ask(messages.CreateModel, model_id=model, base_model="tiny", lora=lora(seed=3))
    fields = {"data": [datum(8, 5)], "loss_fn": "cross_entropy"}
    first = engine.send(messages.ForwardBackward, model_id="w", **fields)
    stepped = engine.send(messages.OptimStep, model_id="w", params=ADAM)
    sleeping = engine.send(messages.Sleep)
    again = engine.send(messages.ForwardBackward, model_id="w", **fields)
    drawn = engine.send(messages.Sample, **sample(engine))
    given_up = engine.send(messages.ForwardBackward, model_id="v", **fields)
    engine.ask(messages.Cancel, target=given_up)
    assert engine.answer(sleeping).output.bytes > 0
    got = engine.answer(again).output
    assert engine.order.index(stepped) < engine.order.index(sleeping) < engine.order.index(again)
    assert engine.answer(given_up).message == "cancelled"
    assert isinstance(engine.answer(drawn), messages.Done)
    # against the same steps of an engine that did not sleep
    engine.ask(messages.ForwardBackward, model_id="v", **fields)
    engine.ask(messages.OptimStep, model_id="v", params=ADAM)
    want = engine.ask(messages.ForwardBackward, model_id="v", **fields)
    np.testing.assert_array_equal(logprobs(got)[0], logprobs(want)[0])
    assert not np.array_equal(logprobs(engine.answer(first).output)[0], logprobs(got)[0])


def test_it_stops_asleep(model_folder, tmp_path):
    engine = EngineClient(tmp_path, model_folder)
    engine.ask(messages.CreateModel, model_id="m", base_model="tiny", lora=lora())
    engine.ask(messages.Sleep)
    assert engine.stop() == 0
