"""Faults of ours, put in on purpose: who is told what, and that the engine lives on."""

import json
import queue

import numpy as np
import pytest
from tinsmith.engine import base_models, compilation, messages
from tinsmith.engine.loop import Engine
from tinsmith.model.sharding import make_mesh

from tests.engine.engine_client import CACHE, datum, logprobs, lora
from tests.tiny_models import write_model

DATA = [datum(20, 0), datum(40, 1)]


class Inbox:
    """A socket whose other end is a list."""

    def __init__(self):
        self.inbox = queue.SimpleQueue()
        self.sent = []

    def send(self, message):
        self.sent.append(message)

    def post(self, event):
        self.inbox.put(event)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    compilation.use_cache(CACHE)
    config = messages.EngineConfig(
        "", str(folder / "data"), str(CACHE), [messages.BaseModel("tiny", str(write_model(folder / "model")))]
    )
    return config, base_models.load(config.base_models[0], config, make_mesh())


@pytest.fixture
def run(base):
    """Runs requests to the end, in a new engine on the same base; gives the answers by request id."""
    config, model = base

    def run(*requests):
        socket = Inbox()
        for request in (*requests, messages.Stop("stop")):
            socket.post(request)
        Engine(config, {"tiny": model}, socket).run()
        answers = [
            message
            for message in socket.sent
            if not isinstance(message, messages.Status | messages.Memory | messages.Measured)
        ]
        asked = [*(request.request_id for request in requests), "stop"]
        assert sorted(answer.request_id for answer in answers) == sorted(asked)
        return {answer.request_id: answer for answer in answers}

    return run


def create(model_id):
    return messages.CreateModel(f"create-{model_id}", model_id, "tiny", lora())


def forward_backward(request_id, model_id):
    return messages.ForwardBackward(request_id, model_id, DATA, "cross_entropy")


def optim_step(request_id, model_id):
    return messages.OptimStep(request_id, model_id, messages.AdamParams())


def sample(request_id):
    params = messages.SamplingParams(max_tokens=2, temperature=0.0, stop_tokens=[])
    prompt = np.arange(5, 15, dtype="<i4").tobytes()
    return messages.Sample(request_id, messages.SamplerRef("tiny"), prompt, 1, params)


def test_when_a_shared_batch_fails_each_model_is_tried_alone(run, base, monkeypatch):
    trainer = base[1].trainer
    start, sizes = trainer.start, []

    def start_unless_shared(jobs):
        sizes.append(len(jobs))
        if len(jobs) > 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: too many")
        return start(jobs)

    expected = run(create("a"), forward_backward("1", "a"))["1"].output
    monkeypatch.setattr(trainer, "start", start_unless_shared)
    answers = run(
        create("a"), create("b"), forward_backward("1", "a"), forward_backward("2", "b"), optim_step("3", "a")
    )
    assert sizes == [2, 1, 1]
    for request_id in "12":
        assert answers[request_id].output.metrics == expected.metrics
        for found, want in zip(logprobs(answers[request_id].output), logprobs(expected), strict=True):
            np.testing.assert_array_equal(found, want)
    assert answers["3"].output.metrics["optimizer_step"] == 1


def test_a_fault_is_reported_to_its_model_alone_and_its_step_is_refused(run, base, monkeypatch, caplog):
    trainer = base[1].trainer
    start = trainer.start

    def start_unless_of_rank_8(jobs):
        if any(job.state.lora.rank == 8 for job in jobs):
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return start(jobs)

    monkeypatch.setattr(trainer, "start", start_unless_of_rank_8)
    answers = run(
        messages.CreateModel("create", "big", "tiny", lora(rank=8)),
        create("a"),
        forward_backward("1", "big"),
        forward_backward("2", "a"),
        optim_step("3", "big"),
        optim_step("4", "a"),
    )
    assert answers["1"].category == "server"
    assert "out of memory" in answers["1"].message
    error_id = answers["1"].message.split("(error ")[1].split(" ")[0]
    assert f"error {error_id} in big: forward_backward" in caplog.text
    assert answers["3"].category == "user"
    assert "every forward_backward since the last optim_step has failed" in answers["3"].message
    assert isinstance(answers["2"], messages.Done)
    assert isinstance(answers["4"], messages.Done)


@pytest.mark.parametrize("when", ["before the sum", "after the sum"])
def test_a_fault_while_adding_leaves_each_model_added_and_done_or_neither(run, base, monkeypatch, when):
    trainer, adding = base[1].trainer, []
    get = trainer.programs.get

    def failing(key, *arguments, **options):
        program = get(key, *arguments, **options)
        if key[0] != "accumulate":
            return program

        def fail_for_the_second(total, gradients):
            adding.append(total)
            if len(adding) == 5:  # the second call of a model, in a batch with the others'
                if when == "after the sum":
                    program(total, gradients)
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return program(total, gradients)

        return fail_for_the_second

    def calls(**times):
        return [
            request
            for model_id, count in times.items()
            for request in (
                create(model_id),
                *(forward_backward(f"{model_id}{n}", model_id) for n in range(count)),
                optim_step(f"step-{model_id}", model_id),
            )
        ]

    with monkeypatch.context() as patch:
        patch.setattr(trainer.programs, "get", failing)
        answers = run(*calls(a=2, b=2, c=2))
    assert len(adding) == 6
    (failed,) = [name for name, answer in answers.items() if isinstance(answer, messages.Failed)]
    assert "out of memory" in answers[failed].message
    expected = run(*calls(**(dict.fromkeys("abc", 2) | {failed[0]: 1})))
    for name, answer in expected.items():
        if name.startswith("step-"):
            assert answers[name].output.metrics == pytest.approx(answer.output.metrics, rel=1e-4), name


def test_a_custom_loss_that_is_stopped_is_charged_to_its_tenant(run, base, monkeypatch):
    monkeypatch.setattr(base[1].trainer.custom_loss_processes, "datum_seconds", 0.02)
    nodes = [
        {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
        {"op": "call_method", "name": "total", "target": "sum", "args": [{"ref": "logprobs"}]},
        {"op": "output", "name": "output", "target": "output", "args": [[{"ref": "total"}, {"dict": {}}]]},
    ]
    graph = json.dumps({"format": 1, "nodes": nodes}).encode()
    loss = messages.CustomLoss("total", [("logprobs", 1)], graph)
    custom = messages.ForwardBackward("1", "a", DATA, "custom", {}, custom_loss=loss)
    answers = run(create("a"), create("b"), custom, forward_backward("2", "b"), optim_step("3", "b"))
    assert answers["1"].category == "user"
    assert "custom loss 'total': stopped after 0.02 s" in answers["1"].message
    assert answers["1"].device_seconds >= 0.02
    assert isinstance(answers["3"], messages.Done)


def test_a_sampler_that_fails_is_replaced(run, base, monkeypatch):
    samplers = base[1].samplers
    expected = run(sample("1"))["1"].output
    with monkeypatch.context() as patch:
        patch.setattr(type(samplers.sampler), "step", lambda self: 1 / 0)
        answers = run(sample("1"), sample("2"))
    assert [answers[request_id].category for request_id in "12"] == ["server", "server"]
    assert run(sample("3"))["3"].output == expected
