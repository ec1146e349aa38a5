"""Every method of the SDK's clients that the server is asked for; test_sdk_methods.py says which is where."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import tinker
from conformance.batches import batch, logprobs
from conformance.conftest import ALICE
from conformance.server_process import ServerProcess
from conformance.test_sdk_checkpoints import PROMPT
from tinker import types

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PARAMS = tinker.SamplingParams(max_tokens=3, temperature=0.0)
ADAM = types.AdamParams(learning_rate=1e-3)


@pytest.fixture(scope="module")
def saved(server: ServerProcess) -> tuple[str, str]:
    """URIs of a training state and of sampler weights."""
    service = tinker.ServiceClient(base_url=server.url, api_key=ALICE)
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
    return training.save_state("state").result().path, training.save_weights_for_sampler("w").result().path


def test_service_client(server: ServerProcess, saved: tuple[str, str], monkeypatch) -> None:
    state, weights = saved
    service = tinker.ServiceClient(base_url=server.url, api_key=ALICE, project_id="methods")

    async def made() -> list[tinker.TrainingClient]:
        (model,) = (await service.get_server_capabilities_async()).supported_models
        assert model.model_name == service.get_server_capabilities().supported_models[0].model_name == "tiny"
        return [
            service.create_lora_training_client(base_model="tiny", rank=4).result(),
            await service.create_lora_training_client_async(base_model="tiny", rank=4),
            service.create_training_client_from_state(state).result(),
            await service.create_training_client_from_state_async(state),
            service.create_training_client_from_state_with_optimizer(state).result(),
            await service.create_training_client_from_state_with_optimizer_async(state),
        ]

    trainings = asyncio.run(made())
    numbers = [training.model_id.rpartition(":")[2] for training in trainings]
    assert numbers == [str(number) for number in range(6)]
    samplers = [
        service.create_sampling_client(model_path=weights).result(),
        asyncio.run(service.create_sampling_client_async(base_model="tiny")),
    ]
    assert [sampler.get_base_model() for sampler in samplers] == ["tiny", "tiny"]
    copied = service.copy_weights(weights).result()
    assert copied.endswith("/sampler_weights/w")
    assert service.create_rest_client().list_checkpoints(copied.split("/")[2]).result().checkpoints
    service.get_telemetry()

    pytest.importorskip("torch")

    def twice(logprobs, weights):
        return -2 * (logprobs * weights).sum(), {}

    loss = service.create_custom_loss(twice, {"logprobs": 1, "weights": 1}).result()
    assert loss.loss_id is not None, "it runs on the server"
    data = batch(2)
    doubled = trainings[0].forward_backward_custom(data, loss).result().metrics["loss:sum"]
    once = trainings[0].forward(data, "cross_entropy").result().metrics["loss:sum"]
    assert doubled == pytest.approx(2 * once, rel=1e-4)
    service.close("success").result()


def _nll(datums, rows):
    import torch

    weights = [torch.tensor(datum.loss_fn_inputs["weights"].data) for datum in datums]
    return -sum((row * weight).sum() for row, weight in zip(rows, weights, strict=True)), {}


def test_training_client(training: tinker.TrainingClient) -> None:
    pytest.importorskip("torch")
    data = batch(2)
    before = logprobs(training.forward(data, "cross_entropy").result())
    state = training.save_state("start").result().path
    built_in = training.forward_backward(data, "cross_entropy").result().metrics["loss:sum"]
    custom = training.forward_backward_custom(data, _nll).result().metrics["loss:sum"]
    assert custom == pytest.approx(built_in, rel=1e-4)
    training.optim_step(ADAM).result()
    for load in (lambda: training.load_state(state), lambda: training.load_state_with_optimizer(state)):
        assert training.forward(data, "cross_entropy").result().metrics["loss:sum"] < built_in
        load().result()
        after = logprobs(training.forward(data, "cross_entropy").result())
        np.testing.assert_allclose(np.concatenate(after), np.concatenate(before), atol=1e-5)
        training.forward_backward(data, "cross_entropy").result()
        training.optim_step(ADAM).result()
    assert training.get_info().model_data.model_name == "tiny"
    assert training.get_tokenizer().encode("hello")
    training.get_telemetry()
    path = training.save_weights_for_sampler("w").result().path
    assert "/external_weights/" in training.save_weights_external("e").result().path
    of_path = training.create_sampling_client(path).result().compute_logprobs(PROMPT).result()
    newest = training.save_weights_and_get_sampling_client().result().compute_logprobs(PROMPT).result()
    np.testing.assert_allclose(of_path[1:], newest[1:], atol=1e-5)


def test_training_client_async(training: tinker.TrainingClient) -> None:
    pytest.importorskip("torch")
    data = batch(2)

    async def run() -> None:
        before = (await (await training.forward_async(data, "cross_entropy"))).metrics["loss:sum"]
        state = (await (await training.save_state_async("start"))).path
        loss = (await (await training.forward_backward_async(data, "cross_entropy"))).metrics["loss:sum"]
        custom = (await (await training.forward_backward_custom_async(data, _nll))).metrics["loss:sum"]
        assert before == pytest.approx(loss) == pytest.approx(custom, rel=1e-4)
        await (await training.optim_step_async(ADAM))
        assert (await (await training.forward_async(data, "cross_entropy"))).metrics["loss:sum"] < loss
        await (await training.load_state_async(state))
        await (await training.load_state_with_optimizer_async(state))
        again = (await (await training.forward_async(data, "cross_entropy"))).metrics["loss:sum"]
        assert again == pytest.approx(loss, rel=1e-5)
        assert (await training.get_info_async()).model_data.model_name == "tiny"
        path = (await (await training.save_weights_for_sampler_async("w"))).path
        assert (await (await training.save_weights_external_async("e"))).path
        of_path = await training.create_sampling_client_async(path)
        newest = await training.save_weights_and_get_sampling_client_async()
        scores = [await sampler.compute_logprobs(PROMPT) for sampler in (of_path, newest)]
        np.testing.assert_allclose(scores[0][1:], scores[1][1:], atol=1e-5)

    asyncio.run(run())


def test_sampling_client(
    server: ServerProcess, service: tinker.ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", server.url)
    sampler = tinker.SamplingClient.create(service.holder, base_model="tiny").result()
    copy = tinker.SamplingClient.from_sampler_handle(sampler.get_sampler_handle(), api_key=ALICE)

    async def run() -> None:
        assert await sampler.get_base_model_async() == sampler.get_base_model() == "tiny"
        tokens = (await sampler.sample_async(PROMPT, 1, PARAMS)).sequences[0].tokens
        assert sampler.sample(PROMPT, 1, PARAMS).result().sequences[0].tokens == tokens
        assert copy.sample(PROMPT, 1, PARAMS).result().sequences[0].tokens == tokens
        scores = await sampler.compute_logprobs_async(PROMPT)
        assert sampler.compute_logprobs(PROMPT).result() == pytest.approx(scores, abs=1e-5, nan_ok=True)

    asyncio.run(run())
    sampler.get_telemetry()
    sampler.on_queue_state_change(tinker.lib.api_future_impl.QueueState.ACTIVE, None)


def test_rest_client(server: ServerProcess, saved: tuple[str, str]) -> None:
    state, weights = saved
    run = state.split("/")[2]
    session = run.partition(":")[0]
    rest = tinker.RestClient(base_url=server.url, api_key=ALICE)
    tinker.AdminClient(base_url=server.url, api_key=ALICE).get_telemetry()
    rest.get_telemetry()
    assert rest.get_server_capabilities().result().supported_models[0].model_name == "tiny"
    assert rest.get_weights_info_by_tinker_path(state).result().lora_rank == 4
    sampling = tinker.ServiceClient(base_url=server.url, api_key=ALICE)
    sampler = sampling.create_sampling_client(model_path=weights).result()._sampling_session_id

    async def twice() -> None:
        pairs = [
            (rest.list_training_runs(limit=100), rest.list_training_runs_async(limit=100)),
            (rest.get_training_run(run), rest.get_training_run_async(run)),
            (rest.get_training_run_by_tinker_path(state), rest.get_training_run_by_tinker_path_async(state)),
            (rest.list_checkpoints(run), rest.list_checkpoints_async(run)),
            (rest.list_user_checkpoints(), rest.list_user_checkpoints_async()),
            (rest.list_sessions(limit=100), rest.list_sessions_async(limit=100)),
            (rest.get_session(session), rest.get_session_async(session)),
            (rest.get_sampler(sampler), rest.get_sampler_async(sampler)),
        ]
        found = [(first.result(), await second) for first, second in pairs]
        assert all(first == second for first, second in found)
        runs, one, of_path, checkpoints, mine, sessions, shown, of_sampler = (first for first, _ in found)
        assert one == of_path
        assert run in {each.training_run_id for each in runs.training_runs}
        assert {each.tinker_path for each in checkpoints.checkpoints} == {state, weights}
        assert {state, weights} <= {each.tinker_path for each in mine.checkpoints}
        assert session in sessions.sessions
        assert (shown.training_run_ids, of_sampler.model_path) == ([run], weights)
        rest.assign_session_project(session, "one").result()
        await rest.assign_session_project_async(session, "other")

    asyncio.run(twice())
    of_project = rest.list_training_runs(project_id="other").result().training_runs
    assert [each.training_run_id for each in of_project] == [run]


def test_rest_client_changes_checkpoints(server: ServerProcess, training: tinker.TrainingClient) -> None:
    paths = [training.save_weights_external(name).result().path for name in ("a", "b", "c", "d")]
    first, run = paths[0], training.model_id
    rest = tinker.RestClient(base_url=server.url, api_key=ALICE)

    def shown() -> dict[str, types.Checkpoint]:
        return {each.tinker_path: each for each in rest.list_checkpoints(run).result().checkpoints}

    async def change() -> None:
        rest.publish_checkpoint_from_tinker_path(first).result()
        await rest.publish_checkpoint_from_tinker_path_async(paths[1])
        assert [shown()[path].public for path in paths] == [True, True, False, False]
        rest.unpublish_checkpoint_from_tinker_path(first).result()
        await rest.unpublish_checkpoint_from_tinker_path_async(paths[1])
        assert not any(each.public for each in shown().values())
        rest.set_checkpoint_ttl_from_tinker_path(first, 7200).result()
        await rest.set_checkpoint_ttl_from_tinker_path_async(paths[1], 7200)
        assert [shown()[path].expires_at is None for path in paths] == [False, False, True, True]
        files = rest.get_external_weights_urls(first).result().urls
        assert set(files) == set((await rest.get_external_weights_urls_async(first)).urls)
        assert "adapter_config.json" in files
        copies = [rest.copy_weights(first, "kept").result(), await rest.copy_weights_async(first, "kept")]
        assert len(set(copies)) == 2
        rest.delete_checkpoint(run, "external_weights/a").result()
        await rest.delete_checkpoint_async(run, "external_weights/b")
        rest.delete_checkpoint_from_tinker_path(paths[2]).result()
        await rest.delete_checkpoint_from_tinker_path_async(paths[3])
        assert shown() == {}
        assert set(rest.get_external_weights_urls(copies[0]).result().urls) == set(files)

    asyncio.run(change())
