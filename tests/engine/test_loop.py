"""The engine as the server sees it: a real process on a tiny model, over a real socket."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tinsmith.engine import messages

from tests.engine.engine_client import EngineClient, datum, logprobs, lora
from tests.tiny_models import write_model

ROOT = Path(__file__).parents[2]
DATA = [datum(20, 0), datum(40, 1), datum(33, 2)]
ADAM = messages.AdamParams(learning_rate=0.01)
PROMPT = np.arange(5, 15, dtype="<i4")
STATE, SAMPLER = "checkpoints/a@0/weights/x-1", "checkpoints/a@0/sampler_weights/x-1"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def shared_engine(model_folder, tmp_path_factory):
    client = EngineClient(tmp_path_factory.mktemp("engine"), model_folder, max_rank=8)
    yield client
    assert client.stop() == 0


@pytest.fixture
def engine(shared_engine):
    """The shared engine, alive; each test names its models after itself."""
    assert shared_engine.process.poll() is None
    return shared_engine


def create(engine, model_id, **fields):
    return engine.ask(
        messages.CreateModel, **{"model_id": model_id, "base_model": "tiny", "lora": lora(), **fields}
    )


def forward_backward(engine, model_id, data=DATA, **fields):
    return engine.ask(
        messages.ForwardBackward, model_id=model_id, data=data, loss_fn="cross_entropy", **fields
    )


def train(engine, model_id, steps=1):
    for _ in range(steps):
        forward_backward(engine, model_id)
        engine.ask(messages.OptimStep, model_id=model_id, params=ADAM)


def sample(engine, ref, **fields):
    params = messages.SamplingParams(max_tokens=4, temperature=0.0, stop_tokens=[])
    return engine.ask(
        messages.Sample,
        **{"sampler": ref, "prompt": PROMPT.tobytes(), "num_samples": 1, "params": params, **fields},
    )


def prompt_logprobs(engine, ref):
    return np.frombuffer(sample(engine, ref, prompt_logprobs=True).prompt_logprobs, "<f4")[1:]


def training_logprobs(engine, model_id):
    """The log-probs that the trainer computes for the prompt."""
    target = messages.Tensor("int64", (len(PROMPT) - 1,), PROMPT[1:].astype("<i8").tobytes())
    weights = messages.Tensor("float32", target.shape, np.ones(target.shape, "<f4").tobytes())
    data = [messages.Datum(PROMPT[:-1].tobytes(), {"target_tokens": target, "weights": weights})]
    return logprobs(forward_backward(engine, model_id, data, forward_only=True))[0]


def assert_equal_outputs(left, right):
    assert left.metrics == right.metrics
    for a, b in zip(logprobs(left), logprobs(right), strict=True):
        np.testing.assert_array_equal(a, b)


def test_training_goes_on_after_kill_9_exactly_where_it_was_saved(model_folder, tmp_path):
    engine = EngineClient(tmp_path, model_folder)
    create(engine, "a:0")
    train(engine, "a:0", 3)
    forward_backward(engine, "a:0", [datum(25, 7)])  # accumulated, not stepped
    saved = engine.ask(messages.SaveState, model_id="a:0", directory=STATE)
    assert saved.size_bytes > 1000
    step = engine.ask(messages.OptimStep, model_id="a:0", params=ADAM)
    expected = forward_backward(engine, "a:0")
    engine.kill()

    engine = EngineClient(tmp_path, model_folder)
    created = create(engine, "a:0", checkpoint=STATE)
    assert (created.step, created.lora) == (3, lora())
    assert engine.ask(messages.OptimStep, model_id="a:0", params=ADAM) == step
    assert_equal_outputs(forward_backward(engine, "a:0"), expected)

    # Loaded into another model, its own state replaced.
    create(engine, "b:0", lora=lora(seed=9))
    train(engine, "b:0")
    loaded = engine.ask(messages.LoadState, model_id="b:0", directory=STATE, optimizer_state=True)
    assert loaded.step == 3
    assert engine.ask(messages.OptimStep, model_id="b:0", params=ADAM) == step
    assert_equal_outputs(forward_backward(engine, "b:0"), expected)
    assert engine.stop() == 0


def test_weights_alone_come_with_a_fresh_optimizer(engine):
    create(engine, "weights:0")
    train(engine, "weights:0", 2)
    engine.ask(messages.SaveState, model_id="weights:0", directory="w/weights-1")
    expected = forward_backward(engine, "weights:0", forward_only=True)
    created = create(engine, "weights:1", checkpoint="w/weights-1", optimizer_state=False)
    assert created.step == 0
    assert_equal_outputs(forward_backward(engine, "weights:1", forward_only=True), expected)
    train(engine, "weights:1")  # no left-over gradients: a fresh Adam's first step is lr in every direction
    loaded = engine.ask(
        messages.LoadState, model_id="weights:1", directory="w/weights-1", optimizer_state=False
    )
    assert loaded.step == 0
    assert_equal_outputs(forward_backward(engine, "weights:1", forward_only=True), expected)


def test_a_save_is_of_its_moment_though_training_goes_on(engine):
    create(engine, "moment")
    train(engine, "moment")
    before = training_logprobs(engine, "moment")
    ids = [
        engine.send(messages.SaveState, model_id="moment", directory="m/state-1"),
        engine.send(messages.SaveSampler, model_id="moment", directory="m/sampler-1"),
        engine.send(messages.SaveSampler, model_id="moment", directory="m/sampler-2", deferred=True),
        engine.send(messages.OptimStep, model_id="moment", params=ADAM),
    ]
    for request_id in ids:
        assert isinstance(engine.answer(request_id), messages.Done)
    train(engine, "moment", 3)
    assert np.abs(training_logprobs(engine, "moment") - before).max() > 0.01
    create(engine, "moment:2", checkpoint="m/state-1")
    np.testing.assert_array_equal(training_logprobs(engine, "moment:2"), before)
    for weights in ("m/sampler-1", "m/sampler-2"):
        found = prompt_logprobs(engine, messages.SamplerRef("tiny", weights))
        np.testing.assert_allclose(found, before, atol=1e-4)


def test_a_sampler_is_read_from_disk_by_a_new_process_and_can_be_trained_on(engine, model_folder, tmp_path):
    create(engine, "peft")
    train(engine, "peft", 2)
    engine.ask(messages.SaveSampler, model_id="peft", directory=SAMPLER)
    expected = training_logprobs(engine, "peft")
    base = prompt_logprobs(engine, messages.SamplerRef("tiny"))
    assert np.abs(base - expected).max() > 0.01

    other = EngineClient(tmp_path, model_folder, data_dir=engine.config.data_dir)
    found = prompt_logprobs(other, messages.SamplerRef("tiny", weights=SAMPLER))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(prompt_logprobs(other, messages.SamplerRef("tiny")), base, atol=1e-5)
    created = create(other, "again", checkpoint=SAMPLER, optimizer_state=False, lora=None)
    assert (created.lora.rank, created.lora.alpha, created.step) == (4, 32.0, 0)
    np.testing.assert_allclose(training_logprobs(other, "again"), expected, atol=1e-5)
    assert other.stop() == 0


def test_deferred_sampler_weights_need_no_disk_until_the_state_is_saved(engine, tmp_path):
    data_dir = Path(engine.config.data_dir)
    create(engine, "deferred")
    train(engine, "deferred")
    expected = training_logprobs(engine, "deferred")
    (data_dir / "blocked").write_text("no directory can be made below a file")
    ref = messages.SamplerRef("tiny", "blocked/sampler-1")
    engine.ask(messages.SaveSampler, model_id="deferred", directory=ref.weights, deferred=True)
    train(engine, "deferred")
    np.testing.assert_allclose(prompt_logprobs(engine, ref), expected, atol=1e-4)
    save = {"model_id": "deferred", "directory": "d/state-1"}
    answer = engine.answer(engine.send(messages.SaveState, **save))
    assert isinstance(answer, messages.Failed), "it would be lost with this process"

    (data_dir / "blocked").unlink()
    engine.ask(messages.SaveState, **save)
    written = data_dir / ref.weights / "adapter_model.safetensors"
    before = written.stat().st_mtime_ns
    # As in a replay: the model has moved on, what was saved has not.
    engine.ask(messages.SaveSampler, model_id="deferred", directory=ref.weights, deferred=True)
    engine.ask(messages.SaveState, **save)
    assert written.stat().st_mtime_ns == before
    np.testing.assert_allclose(prompt_logprobs(engine, ref), expected, atol=1e-4)

    engine.ask(messages.ReleaseSampler, weights=ref.weights)
    np.testing.assert_allclose(prompt_logprobs(engine, ref), expected, atol=1e-4)
    shutil.rmtree(data_dir / "blocked")
    engine.ask(messages.ReleaseSampler, weights=ref.weights)
    fields = {"prompt": PROMPT.tobytes(), "num_samples": 1, "params": messages.SamplingParams(max_tokens=1)}
    lost = engine.answer(engine.send(messages.Sample, sampler=ref, **fields))
    assert isinstance(lost, messages.Failed)
    assert lost.category == "missing"


def test_samples_wait_for_the_weights_that_a_replay_is_about_to_make(engine):
    create(engine, "replayed")
    replay = [
        engine.send(messages.ForwardBackward, model_id="replayed", data=DATA, loss_fn="cross_entropy"),
        engine.send(messages.OptimStep, model_id="replayed", params=ADAM),
        engine.send(messages.SaveSampler, model_id="replayed", directory="replayed/sampler-1", deferred=True),
    ]
    found = prompt_logprobs(engine, messages.SamplerRef("tiny", "replayed/sampler-1"))
    np.testing.assert_allclose(found, training_logprobs(engine, "replayed"), atol=1e-4)
    assert all(isinstance(engine.answer(request_id), messages.Done) for request_id in replay)


def test_operations_of_a_model_keep_their_order_and_models_take_turns(engine):
    for name in "xyz":
        create(engine, f"turns:{name}", lora=lora(seed=ord(name)))
    sent = {name: [] for name in "xyz"}
    for name in "xyz":  # all of x's arrive before any of y's
        for _ in range(4):
            sent[name].append(
                engine.send(
                    messages.ForwardBackward, model_id=f"turns:{name}", data=DATA, loss_fn="cross_entropy"
                )
            )
            sent[name].append(engine.send(messages.OptimStep, model_id=f"turns:{name}", params=ADAM))
    first = len(engine.order)
    for request_id in [request_id for ids in sent.values() for request_id in ids]:
        assert isinstance(engine.answer(request_id), messages.Done)
    order = engine.order[first:]
    for ids in sent.values():
        positions = [order.index(request_id) for request_id in ids if request_id in order]
        assert positions == sorted(positions)
    # The last model's first answer does not wait for the first model's last.
    assert engine.order.index(sent["z"][0]) < engine.order.index(sent["x"][-1])

    # Interleaved, and perhaps batched together, each has learned what it would have learned alone.
    create(engine, "turns:alone", lora=lora(seed=ord("y")))
    train(engine, "turns:alone", 4)
    np.testing.assert_allclose(
        training_logprobs(engine, "turns:y"), training_logprobs(engine, "turns:alone"), atol=1e-4
    )


def test_sampling_goes_on_beside_a_long_training_operation(engine):
    create(engine, "long")
    train(engine, "long")
    sample(engine, messages.SamplerRef("tiny"))  # compiled
    data = [datum(500, seed) for seed in range(24)]
    forward_backward(engine, "long", data[:2])  # compiled
    long = engine.send(messages.ForwardBackward, model_id="long", data=data, loss_fn="cross_entropy")
    short = engine.send(
        messages.Sample,
        sampler=messages.SamplerRef("tiny"),
        prompt=PROMPT.tobytes(),
        num_samples=1,
        params=messages.SamplingParams(max_tokens=4, temperature=0.0, stop_tokens=[]),
    )
    assert isinstance(engine.answer(short), messages.Done)
    assert long not in engine.answers
    assert isinstance(engine.answer(long), messages.Done)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"base_model": "huge"}, r"unknown base model 'huge'; this server has: tiny"),
        ({"lora": lora(rank=9)}, r"rank 9: it must be between 1 and 8"),
        ({"lora": lora(rank=0)}, r"rank 0: it must be between 1 and 8"),
        ({"lora": None}, r"full-weight training is not enabled"),
        ({"optimizer": "adam"}, r"unknown optimizer 'adam'; known: adamw, dimuon, sgd, signsgd, muon"),
        ({"optimizer": "sgd", "optimizer_options": {"beta": 1}}, r"no option 'beta'; it takes: momentum"),
        ({"checkpoint": "no/such-1"}, r"the checkpoint no longer exists"),
        ({"lora": lora(train_attn=False, train_mlp=False, train_unembed=False)}, r"nothing would be trained"),
    ],
)
def test_an_impossible_model_is_refused(engine, fields, expected):
    message = engine.refused(
        messages.CreateModel, **{"model_id": "bad", "base_model": "tiny", "lora": lora(), **fields}
    )
    assert expected in message
    assert "unknown model 'bad'" in engine.refused(messages.OptimStep, model_id="bad", params=ADAM)


def test_a_users_error_harms_no_other_request(engine):
    create(engine, "good")
    create(engine, "user")
    before = training_logprobs(engine, "user")
    bad = [*DATA, datum(9, vocab=100_000)]
    requests = {"data": bad, "loss_fn": "cross_entropy"}
    assert "datum 3" in engine.refused(messages.ForwardBackward, model_id="user", **requests)
    # Nothing to step with: the client would believe that it has trained.
    refusal = engine.refused(messages.OptimStep, model_id="user", params=ADAM)
    assert "every forward_backward since the last optim_step has failed" in refusal
    np.testing.assert_array_equal(training_logprobs(engine, "user"), before)
    # One that succeeds makes the step possible, whatever failed beside it.
    forward_backward(engine, "user")
    engine.refused(messages.ForwardBackward, model_id="user", **requests)
    assert engine.ask(messages.OptimStep, model_id="user", params=ADAM).metrics["optimizer_step"] == 1
    train(engine, "good")
    np.testing.assert_array_equal(training_logprobs(engine, "good"), training_logprobs(engine, "user"))


def test_a_state_of_another_shape_is_refused_and_the_model_stays(engine):
    create(engine, "shape:4")
    create(engine, "shape:8", lora=lora(rank=8))
    engine.ask(messages.SaveState, model_id="shape:8", directory="s/shape-1")
    train(engine, "shape:4")
    before = training_logprobs(engine, "shape:4")
    refusal = engine.refused(
        messages.LoadState, model_id="shape:4", directory="s/shape-1", optimizer_state=True
    )
    assert "rank 8" in refusal
    assert "rank 4" in refusal
    np.testing.assert_array_equal(training_logprobs(engine, "shape:4"), before)
    refusal = engine.refused(
        messages.CreateModel, model_id="shape:x", base_model="tiny", lora=lora(), checkpoint="s/shape-1"
    )
    assert "rank 8" in refusal


def test_cancelled_work_fails_and_the_rest_goes_on(engine):
    create(engine, "cancel")
    data = [datum(500, seed) for seed in range(24)]
    ids = [
        engine.send(messages.ForwardBackward, model_id="cancel", data=data, loss_fn="cross_entropy")
        for _ in range(2)
    ]
    sampled = engine.send(
        messages.Sample,
        sampler=messages.SamplerRef("tiny"),
        prompt=PROMPT.tobytes(),
        num_samples=2,
        params=messages.SamplingParams(max_tokens=400, stop_tokens=[]),
    )
    for target in (*ids, sampled):
        engine.ask(messages.Cancel, target=target)
    for target in (*ids, sampled):
        answer = engine.answer(target)
        assert isinstance(answer, messages.Failed)
        assert (answer.category, answer.message) == ("user", "cancelled")
    engine.ask(messages.Cancel, target="nobody")
    # What was cancelled has accumulated nothing.
    create(engine, "cancel:not")
    for model_id in ("cancel", "cancel:not"):
        train(engine, model_id)
    np.testing.assert_array_equal(
        training_logprobs(engine, "cancel"), training_logprobs(engine, "cancel:not")
    )


def test_a_deleted_model_is_unknown_and_its_name_free(engine):
    create(engine, "delete")
    assert "exists already" in engine.refused(
        messages.CreateModel, model_id="delete", base_model="tiny", lora=lora()
    )
    engine.ask(messages.DeleteModel, model_id="delete")
    assert "unknown model 'delete'" in engine.refused(messages.DeleteModel, model_id="delete")
    assert create(engine, "delete").step == 0


def test_an_internal_error_has_an_id_in_the_log_and_harms_no_other_request(engine):
    create(engine, "internal")
    create(engine, "internal:other")
    directory = "internal/state-1"
    engine.ask(messages.SaveState, model_id="internal", directory=directory)
    (engine.folder / "data" / directory / "metadata" / "metadata").write_text("not json")
    answer = engine.answer(
        engine.send(messages.LoadState, model_id="internal", directory=directory, optimizer_state=True)
    )
    assert isinstance(answer, messages.Failed)
    assert answer.category == "server"
    error_id = answer.message.split("(error ")[1].split(" ")[0]
    log = engine.log.read_text()
    assert f"error {error_id} in internal: LoadState" in log
    assert "JSONDecodeError" in log
    assert "Traceback" not in answer.message
    train(engine, "internal")
    train(engine, "internal:other")


def test_full_weights_are_trained_saved_and_sampled(model_folder, tmp_path):
    engine = EngineClient(tmp_path, model_folder, full_weight=True)
    assert create(engine, "full", lora=None).lora is None
    train(engine, "full", 2)
    expected = training_logprobs(engine, "full")
    engine.ask(messages.SaveState, model_id="full", directory="f/state-1")
    engine.ask(messages.SaveSampler, model_id="full", directory="f/sampler-1")
    found = prompt_logprobs(engine, messages.SamplerRef("tiny", weights="f/sampler-1"))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    create(engine, "again", lora=None, checkpoint="f/state-1")
    np.testing.assert_array_equal(training_logprobs(engine, "again"), expected)
    assert engine.stop() == 0


def test_stop_finishes_what_was_asked_for(model_folder, tmp_path):
    """Signals are for the server, which sends the stop."""
    engine = EngineClient(tmp_path, model_folder)
    create(engine, "stop")
    ids = []
    for step in range(3):
        ids += [
            engine.send(messages.ForwardBackward, model_id="stop", data=DATA, loss_fn="cross_entropy"),
            engine.send(messages.OptimStep, model_id="stop", params=ADAM),
            engine.send(messages.SaveState, model_id="stop", directory=f"stop/state-{step}"),
        ]
    engine.answer(ids[0])
    engine.process.send_signal(signal.SIGINT)
    engine.process.send_signal(signal.SIGTERM)
    ids.append(engine.send(messages.Stop))
    for request_id in ids:
        assert isinstance(engine.answer(request_id), messages.Done)
    assert engine.close() == 0
    assert "stopping" in [status.phase for status in engine.statuses]


def test_the_engine_does_not_outlive_its_server(model_folder, tmp_path):
    program = (
        "import sys; from pathlib import Path; from tests.engine.engine_client import EngineClient\n"
        f"engine = EngineClient(Path({str(tmp_path)!r}), Path({str(model_folder)!r}))\n"
        "print(engine.process.pid, flush=True); sys.stdin.read()"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    pid = int(server.stdout.readline())
    server.kill()
    server.wait()
    deadline = time.monotonic() + 10
    while _runs(pid):
        assert time.monotonic() < deadline, "the engine is still there"
        time.sleep(0.01)


def test_a_missing_base_model_is_reported_plainly(tmp_path):
    engine = EngineClient(tmp_path, tmp_path / "nowhere", wait=False)
    assert engine.close() == 1
    log = engine.log.read_text()
    assert "cannot start" in log
    assert "nowhere" in log
    assert "Traceback" not in log


def _runs(pid: int) -> bool:
    """Return whether the process is there, and not only as a zombie that nobody has waited for."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_names_of_one_folder_share_its_weights(model_folder, tmp_path):
    names = [messages.BaseModel(name, str(model_folder)) for name in ("tiny", "alias")]
    engine = EngineClient(tmp_path, model_folder, base_models=names)
    create(engine, "here")
    create(engine, "there", base_model="alias")
    train(engine, "here")
    train(engine, "there")
    here, there = (logprobs(forward_backward(engine, name, forward_only=True)) for name in ("here", "there"))
    for a, b in zip(here, there, strict=True):
        np.testing.assert_array_equal(a, b)
    assert engine.stop() == 0
    assert engine.log.read_text().count("loaded in") == 1
