"""Losses that the SDK traces and the server runs: as the client runs them itself, to the last digits."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from conformance.batches import batch, logprobs
from conformance.conftest import ALICE, BOB
from conformance.server_process import ServerProcess, Wire, datum, tensor
from tinker import types
from tinker.proto import tinker_public_pb2 as pb
from tinsmith.server.app import create_app
from tinsmith.server.settings import Settings

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ADAM = types.AdamParams(learning_rate=1e-2)
GRAPH = {
    "format": 1,
    "nodes": [
        {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
        {"op": "call_method", "name": "sum_1", "target": "sum", "args": [{"ref": "logprobs"}]},
        {"op": "output", "name": "output", "target": "output", "args": [[{"ref": "sum_1"}, {"dict": {}}]]},
    ],
}


def clipped(logprobs, sampled, weights, beta):
    ratio = torch.exp(logprobs - sampled)
    loss = -torch.minimum(ratio * weights, ratio.clamp(0.9, 1.1) * weights).mean() * beta
    outside = ((ratio - 1).abs() > 0.1).float()
    return loss, {"custom/outside:mean": outside.mean(), "custom/ratio:sum": ratio.sum()}


def towards_teacher(logprobs, teacher):
    reverse_kl = (logprobs.exp() * (logprobs - teacher)).sum(dim=-1)
    return reverse_kl.mean(), {"custom/kl:mean": reverse_kl.max()}


def log_of_what_is_negative(logprobs):
    return torch.log(logprobs).sum(), {}


def vectors() -> list[types.Datum]:
    data = batch(4)
    for seed, each in enumerate(data):
        length = len(each.loss_fn_inputs["target_tokens"].data)
        sampled = -5.5 + 0.5 * np.random.default_rng(seed).standard_normal(length)
        each.loss_fn_inputs["sampled"] = types.TensorData.from_numpy(sampled.astype(np.float32))
        each.loss_fn_inputs["beta"] = types.TensorData.from_torch(torch.tensor(0.5 + seed))
    return data


def matrices() -> list[types.Datum]:
    random = np.random.default_rng(3)
    data = []
    for length in (5, 9, 5):
        inputs = {
            "target_tokens": random.integers(3, 300, (length, 4)),
            "teacher": random.standard_normal((length, 4)).astype(np.float32) - 4,
        }
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(random.integers(3, 300, length).tolist()),
                loss_fn_inputs={name: types.TensorData.from_numpy(value) for name, value in inputs.items()},
            )
        )
    return data


@pytest.mark.parametrize(
    ("function", "ranks", "data"),
    [
        (clipped, {"logprobs": 1, "sampled": 1, "weights": 1, "beta": 0}, vectors()),
        (towards_teacher, {"logprobs": 2, "teacher": 2}, matrices()),
    ],
    ids=["N", "N-K"],
)
def test_the_server_computes_what_the_client_does(
    service: tinker.ServiceClient, function, ranks, data: list[types.Datum]
) -> None:
    loss = service.create_custom_loss(function, ranks).result()
    assert loss.loss_id is not None, "the server runs it"
    in_client = dataclasses.replace(loss, loss_id=None)
    linear = [
        types.Datum(
            model_input=each.model_input,
            loss_fn_inputs={
                "target_tokens": each.loss_fn_inputs["target_tokens"],
                "weights": np.zeros(each.loss_fn_inputs["target_tokens"].to_numpy().shape, np.float32),
            },
        )
        for each in data
    ]
    outputs, after = [], []
    for run in (loss, in_client):
        training = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
        training.forward_backward_custom(data, run).result()
        training.optim_step(ADAM).result()
        outputs.append(training.forward_backward_custom(data, run).result())
        training.optim_step(ADAM).result()
        after.append(logprobs(training.forward(linear, "cross_entropy").result()))
    server, client = outputs
    for key in ("loss:sum", *(key for key in client.metrics if key.startswith("custom/"))):
        assert server.metrics[key] == pytest.approx(client.metrics[key], rel=1e-5)
    assert len(server.metrics) > 3
    for results in (zip(*map(logprobs, outputs), strict=True), zip(*after, strict=True)):
        for one, other in results:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_loss_without_gradients_of_the_model(wire: Wire, service: tinker.ServiceClient) -> None:
    """forward_only, over the wire: the values are there, and nothing is accumulated."""
    session = wire.session()
    model = wire.model(session)
    created = create(wire, session)
    fields = {"loss_fn_config_v2": config(wire.result(created)["loss_id"])}
    answer = wire.result(wire.forward_backward(model, 1, loss="custom", forward_only=True, **fields))
    values = answer["loss_fn_outputs"][0]["logprobs"]["data"]
    assert answer["metrics"]["loss:sum"] == pytest.approx(sum(values), rel=1e-6)
    assert wire.result(wire.optim_step(model, 2))["metrics"]["grad_norm"] == 0.0


def create(wire: Wire, session: str, graph: dict = GRAPH, number: int = 0, **fields) -> httpx.Response:
    body = {"name": "total", "inputs": [{"name": "logprobs", "rank": 1}], "graph": graph} | fields
    return wire.post("create_custom_loss", session_id=session, custom_loss_seq_id=number, **body)


def config(loss_id: str) -> dict[str, pb.LossConfigValue]:
    return {"loss_id": pb.LossConfigValue(text=loss_id)}


def calling(**node) -> dict:
    first, second, last = GRAPH["nodes"]
    return {"format": 1, "nodes": [first, second | node, last]}


@pytest.mark.parametrize(
    ("graph", "told"),
    [
        (calling(op="call_function", target="os.system"), "node 'sum_1' (os.system)"),
        (calling(target="backward"), "node 'sum_1' (backward)"),
        (calling(op="call_module", target="linear"), "call_module"),
        (calling(op="get_attr", target="_tensor_constant0"), "get_attr"),
        (calling(args=[{"ref": "output"}]), "'output' is not the name of an earlier node"),
        (calling(args=[{"ref": "logprobs"}, {"code": "x"}]), "an argument 'code'"),
        ({"format": 2, "nodes": []}, "format"),
        ({"format": 1, "nodes": GRAPH["nodes"][1:]}, "'logprobs' is not the name of an earlier node"),
        ({"format": 1, "nodes": GRAPH["nodes"][:1] * 600}, "600 nodes"),
    ],
)
def test_invalid_graphs(wire: Wire, graph: dict, told: str) -> None:
    refused = create(wire, wire.session(), graph)
    assert refused.status_code == 400
    assert told in refused.json()["detail"]


def test_a_traced_node_that_cannot_run_is_named(service: tinker.ServiceClient) -> None:
    def with_svd(logprobs):
        return torch.linalg.svd(logprobs[:, None]).S.sum(), {}

    with pytest.raises(tinker.BadRequestError, match=r"node 'linalg_svd' \(torch._C._linalg.linalg_svd\)"):
        service.create_custom_loss(with_svd, {"logprobs": 1}).result()


def test_a_value_that_is_not_finite_fails_and_changes_nothing(
    service: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    data = batch(2)
    before = logprobs(training.forward(data, "cross_entropy").result())
    loss = service.create_custom_loss(log_of_what_is_negative, {"logprobs": 1}).result()
    with pytest.raises(
        tinker.RequestFailedError, match="datum 0: custom loss 'log_of_what_is_negative' is nan"
    ):
        training.forward_backward_custom(data, loss).result()
    with pytest.raises(tinker.RequestFailedError, match="nothing to step with"):
        training.optim_step(ADAM).result()
    after = logprobs(training.forward(data, "cross_entropy").result())
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


def call(name: str, target: str, *args: Any, op: str = "call_function") -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args)}


LOGPROBS = {"ref": "logprobs"}
DOUBLED = [call(f"t{i}", "operator.add", {"ref": f"t{i - 1}"}, {"ref": f"t{i - 1}"}) for i in range(1, 40)]


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        ([call("last", "expand", LOGPROBS, 1 << 40, -1, op="call_method")], "node 'last' (expand)"),
        ([call("last", "torch.arange", 0, 1 << 33, 1)], "node 'last' (torch.arange): a tensor of shape"),
        ([call("t0", "getattr", LOGPROBS, "shape"), *DOUBLED], "a tuple of 2048 elements"),
        (
            [
                call("table", "torch.full", [3600, 3600], 1.0),
                call("scaled", "torch.mul", {"ref": "table"}, {"ref": "logprobs_sum"}),
                call("last", "torch.matmul", {"ref": "scaled"}, {"ref": "scaled"}),
            ],
            "floating point operations",
        ),
    ],
)
def test_a_loss_that_would_be_too_large_is_refused_before_it_is_computed(
    wire: Wire, nodes: list[dict[str, Any]], told: str
) -> None:
    session = wire.session()
    first, _, output = GRAPH["nodes"]
    summed = call("logprobs_sum", "sum", LOGPROBS, op="call_method")
    total = call(
        "sum_1", "sum", {"ref": "last" if nodes[-1]["name"] == "last" else "logprobs"}, op="call_method"
    )
    created = create(wire, session, {"format": 1, "nodes": [first, summed, *nodes, total, output]})
    fields = {"loss_fn_config_v2": config(wire.result(created)["loss_id"])}
    answer = wire.result(wire.forward_backward(wire.model(session), 1, loss="custom", **fields))
    assert answer["category"] == "user"
    assert told in answer["error"]


def test_a_loss_is_its_session_s(server: ServerProcess, wire: Wire) -> None:
    session = wire.session()
    mine = wire.result(create(wire, session))["loss_id"]
    again = create(wire, session)
    assert wire.result(again)["loss_id"] == mine, "the same number is the same loss"
    bob = Wire(server.url, BOB)
    for other, owner in ((bob, BOB), (wire, ALICE)):
        model = other.model()
        told = [
            other.forward_backward(model, number, loss="custom", loss_fn_config_v2=config(loss_id))
            for number, loss_id in ((1, mine), (2, mine.replace(session, "0" * 32)))
        ]
        assert [answer.status_code for answer in told] == [404, 404], owner
        texts = [answer.json()["detail"].replace(session, "0" * 32) for answer in told]
        assert texts[0] == texts[1]


def test_a_session_has_a_bounded_number_of_losses(wire: Wire) -> None:
    session = wire.session()
    answers = [create(wire, session, number=number) for number in range(65)]
    assert [answer.status_code for answer in answers] == [200] * 64 + [400]
    assert "64 losses" in answers[-1].json()["detail"]


@pytest.mark.slow
def test_a_loss_outlives_kills(make_server) -> None:
    """It survives kills of the engine and of the server; operations that used it are replayed with it."""
    server: ServerProcess = make_server().start()
    wire = Wire(server.url, "tml-local")
    session = wire.session()
    models = [wire.model(session, number) for number in range(2)]
    loss = config(wire.result(create(wire, session))["loss_id"])
    custom = {"loss": "custom", "loss_fn_config_v2": loss}
    linear = {"datums": [datum(weights=tensor([-1.0] * 4))]}  # the same by another name

    def steps(seq_id: int) -> list[list[float]]:
        values = []
        for model, operation in zip(models, (custom, linear), strict=True):
            result = wire.result(wire.forward_backward(model, seq_id, **operation))
            wire.result(wire.optim_step(model, seq_id + 1, learning_rate=0.01))
            values.append(result["loss_fn_outputs"][0]["logprobs"]["data"])
        return values

    before = steps(1)
    server.engine.kill()
    server.kill()
    server.start()
    after = steps(3)
    for one, other in (before, after):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert abs(after[0][0] - before[0][0]) > 1e-3, "the first step was not lost"
    assert server.stop() == 0


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    async def flag(enabled: bool) -> bool:
        app = create_app(Settings(data_dir=tmp_path, custom_loss_server_side=enabled), [])
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost"
        ) as client:
            headers = {"X-API-Key": "tml-local"}
            answer = await client.post("/api/v1/client/config", json={}, headers=headers)
        return answer.json()["custom_loss_server_side"]

    assert [asyncio.run(flag(enabled)) for enabled in (True, False)] == [True, False]
