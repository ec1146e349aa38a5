"""Whatever a client sends: a clear error that names the place, and the model as it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zstandard
from conformance.conftest import ALICE, BOB
from conformance.server_process import PROTOBUF, ServerProcess, Wire, datum, tensor
from tinker.proto import tinker_public_pb2 as pb


class Model:
    """A model and the next number of its sequence."""

    def __init__(self, wire: Wire):
        self.wire = wire
        self.id = wire.model()
        self._next = 0

    def number(self) -> int:
        self._next += 1
        return self._next

    def loss(self) -> float:
        done = self.wire.result(self.wire.forward_backward(self.id, self.number(), forward_only=True))
        return done["metrics"]["loss:sum"]


@pytest.fixture(scope="module")
def model(server: ServerProcess) -> Model:
    return Model(Wire(server.url, ALICE))


def message_of(wire: Wire, submitted) -> str:
    """The error of a submit, or of the operation if it was accepted."""
    body = submitted.json()
    if submitted.status_code == 200:
        body = wire.result(submitted)
        assert body.get("category") == "user", body
    else:
        assert submitted.status_code in (400, 422), submitted.text
        assert (body["detail"], body["category"]) == (body["error"], "user")
        assert (body["status_code"], body["path"]) == (submitted.status_code, submitted.request.url.path)
    return body["error"]


def sparse(shape: list[int], crow: list[int], cols: list[int], values: list[float]) -> pb.Tensor:
    csr = pb.SparseCsr(
        values=np.asarray(values, "<f4").tobytes(),
        crow_indices=np.asarray(crow, "<i8").tobytes(),
        col_indices=np.asarray(cols, "<i8").tobytes(),
    )
    return pb.Tensor(sparse_csr=csr, dtype=pb.DTYPE_FLOAT32, shape=shape)


GOOD = datum()
BAD_DATUMS = {
    "targets too short": (datum(targets=[6, 7, 8], weights=tensor([1.0] * 4)), "target_tokens"),
    "weights too long": (datum(weights=tensor([1.0] * 5)), "weights"),
    "token over the vocabulary": (datum(tokens=(5, 6, 999_999, 8)), ""),
    "negative token": (datum(tokens=(5, -6, 7, 8)), ""),
    "target over the vocabulary": (datum(targets=(6, 7, 8, 999_999)), "target_tokens"),
    "no tokens": (datum(tokens=(), targets=()), "model_input"),
    "too long": (datum(tokens=[5] * 600, targets=[5] * 600), ""),
    "no targets": (pb.Datum(model_input=GOOD.model_input), ""),
    "float targets": (datum(target_tokens=tensor([6.0, 7, 8, 9])), "target_tokens"),
    "integer weights": (datum(weights=tensor([1, 1, 1, 1], "int64")), "weights"),
    "no dtype": (datum(weights=pb.Tensor(dense=bytes(16), shape=[4])), "weights"),
    "no values": (datum(weights=pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[4])), "weights"),
    "half a number": (datum(weights=pb.Tensor(dense=bytes(15), dtype=pb.DTYPE_FLOAT32)), "weights"),
    "shape and bytes": (datum(weights=tensor([1.0] * 4, shape=[5])), "weights"),
    "negative shape": (datum(weights=tensor([1.0] * 4, shape=[-2, -2])), "weights"),
    "three dimensions": (datum(weights=tensor([1.0] * 4, shape=[4, 1, 1])), "weights"),
    "NaN weight": (datum(weights=tensor([1.0, float("nan"), 1.0, 1.0])), "weights"),
    "sparse without shape": (datum(weights=sparse([], [0], [], [])), "weights"),
    "sparse bomb": (datum(weights=sparse([4, 1 << 60], [0] * 5, [], [])), "weights"),
    "sparse rows": (datum(weights=sparse([4, 2], [0, 2, 1, 1, 1], [0], [1.0])), "weights"),
    "sparse columns": (datum(weights=sparse([4, 2], [0, 1, 1, 1, 1], [2], [1.0])), "weights"),
    "an image": (pb.Datum(model_input=[pb.Chunk(image=pb.ImageChunk(data=b"x", format="png"))]), ""),
    "half a token": (
        pb.Datum(model_input=[pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=b"abcde"))]),
        "model_input",
    ),
}


@pytest.mark.parametrize("name", BAD_DATUMS)
def test_bad_datums(model: Model, name: str) -> None:
    before = model.loss()
    bad, place = BAD_DATUMS[name]
    answer = model.wire.forward_backward(model.id, model.number(), [GOOD, bad])
    message = message_of(model.wire, answer)
    assert "datum 1" in message
    assert place in message
    assert model.loss() == before


def test_bad_requests(model: Model) -> None:
    wire, before = model.wire, model.loss()
    assert "data" in message_of(wire, wire.forward_backward(model.id, model.number(), []))
    assert "loss_fn" in message_of(wire, wire.forward_backward(model.id, model.number(), loss=""))
    unknown = wire.forward_backward(model.id, model.number(), loss="hinge")
    assert "hinge" in message_of(wire, unknown)
    missing = wire.forward_backward(model.id, model.number(), loss="importance_sampling")
    assert "datum 0" in message_of(wire, missing)
    gspo = {"logprobs": tensor([-1.0] * 4), "advantages": tensor([1.0] * 4)}
    no_mask = wire.forward_backward(model.id, model.number(), [datum(**gspo)], loss="gspo")
    assert "sequence_ratio_mask" in message_of(wire, no_mask)
    bad_config = {"loss_fn_config": {"clip_low_threshold": float("inf")}}
    config = wire.forward_backward(model.id, model.number(), loss="ppo", **bad_config)
    assert "clip_low_threshold" in message_of(wire, config)
    for adam in ({"learning_rate": -1.0}, {"beta1": 1.5}, {"eps": "tiny"}):
        assert next(iter(adam)) in message_of(wire, wire.optim_step(model.id, model.number(), **adam))
    assert "seq_id" in message_of(wire, wire.forward_backward(model.id, 0))
    assert model.loss() == before


def test_bodies_that_are_not_what_they_say(model: Model) -> None:
    wire, before = model.wire, model.loss()
    whole = pb.ForwardBackwardRequest(model_id=model.id, seq_id=model.number(), loss_fn="cross_entropy")
    whole.data.append(datum())
    message = message_of(wire, wire.post_protobuf(whole.SerializeToString()[:-5]))
    assert "truncated" in message
    not_zstd = wire.post_protobuf(b"not zstd at all", **{"Content-Encoding": "zstd"})
    assert "zstd" in message_of(wire, not_zstd)
    bomb = zstandard.compress(bytes(64 << 20))
    assert wire.post_protobuf(bomb, **{"Content-Encoding": "zstd"}).status_code == 413
    assert wire.post_protobuf(bytes(9 << 20)).status_code == 413
    assert wire.http.post("/api/v1/forward_backward", json={"model_id": model.id}).status_code == 400
    for body in (b"{", b"[]", b"\xff\xfe", b"null", b'{"model_id": {"a": 1}}'):
        answer = wire.http.post(
            "/api/v1/optim_step", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 422, body
        assert answer.json()["category"] == "user"
    assert model.loss() == before


LONG = {
    "api/v1/optim_step": ({"model_id": "m", "adam_params": {"beta1": "?"}}, "adam_params.beta1"),
    "api/v1/asample": ({"prompt": {"chunks": []}, "sampling_params": {"seed": "?"}}, "sampling_params.seed"),
    "api/v1/forward_backward": ({"data": [{"model_input": [5, "?"]}]}, "data.0.model_input.1"),
    "api/v1/create_session": ({"user_metadata": {"run": "?"}}, "user_metadata.run"),
    "generate": ({"input_ids": [5, "?"]}, "input_ids.1"),
    "v1/completions": ({"model": "tiny", "prompt": [5], "max_tokens": "?"}, "max_tokens"),
    "v1/chat/completions": ({"model": "tiny", "messages": [{"role": "user", "content": "?"}]}, "messages"),
}


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("path", LONG)
def test_a_number_of_thousands_of_digits_is_refused_by_the_name_of_its_field(
    wire: Wire, path: str, size: str
) -> None:
    fields, named = LONG[path]
    padding = {"padding": "a" * 100_000} if size == "large" else {}
    body = json.dumps(padding | fields).encode().replace(b'"?"', b"-" + b"9" * 5000)
    answer = wire.http.post(f"/{path}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == (400 if path.startswith("v1/") else 422), answer.text
    detail = answer.json()["detail"]
    assert detail.startswith(named)
    assert "5000 digits" in detail
    if path.startswith("v1/"):
        assert answer.json()["error"]["param"].startswith(named)


def test_impossible_models_are_refused(wire: Wire) -> None:
    session = wire.session()

    def create(**changes):
        body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}}
        return message_of(wire, wire.post("create_model", **(body | changes)))

    assert "no/such-model" in create(base_model="no/such-model")
    assert "16" in create(lora_config={"rank": 17})
    assert "rank" in create(lora_config={"rank": -1})
    assert "rank" in create(lora_config={"rank": 0})
    assert "lora_config" in create(lora_config=None)
    nothing = {"rank": 4, "train_attn": False, "train_mlp": False, "train_unembed": False}
    assert "nothing to train" in create(lora_config=nothing)
    assert "adafactor" in create(optimizer_config={"type": "adafactor"})
    lora = {"rank": 4}
    unknown = wire.post(
        "create_model", session_id="nobody", model_seq_id=0, base_model="tiny", lora_config=lora
    )
    assert unknown.status_code == 404
    assert wire.optim_step("nobody:train:0", 1).status_code == 404
    assert wire.post("get_info", model_id="nobody:train:0").status_code == 404


@pytest.mark.parametrize("name", ["", "..", "a/b", "../../etc/passwd", "a b", "x" * 200, "ü", "a\n", "a\x00"])
def test_invalid_names(model: Model, name: str) -> None:
    wire = model.wire
    for path in ("save_weights", "save_weights_for_sampler"):
        answer = wire.post(path, model_id=model.id, seq_id=model.number(), path=name)
        assert answer.status_code == 400, answer.text
        assert "name" in answer.json()["error"]
    uri = f"tinker://{model.id}/weights/{name}"
    assert wire.post("load_weights", model_id=model.id, seq_id=model.number(), path=uri).status_code == 400
    assert np.isfinite(model.loss())


def test_impossible_samples_are_refused(wire: Wire) -> None:
    session = wire.session()
    made = wire.post(
        "create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model="tiny"
    )
    sampler = made.json()["sampling_session_id"]

    def sample(prompt: list[int], **changes):
        body = {
            "sampling_session_id": sampler,
            "seq_id": 0,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]},
            "sampling_params": {"max_tokens": 2},
        }
        return message_of(wire, wire.post("asample", **(body | changes)))

    assert "prompt" in sample([])
    assert "999999" in sample([5, 999_999])
    assert "prompt" in sample([5] * 600)
    assert "num_samples" in sample([5], num_samples=0)
    assert "num_samples" in sample([5], num_samples=10**6)
    assert "temperature" in sample([5], sampling_params={"temperature": -1})
    assert "top_p" in sample([5], sampling_params={"top_p": 2})
    assert "max_tokens" in sample([5], sampling_params={"max_tokens": 0})
    assert wire.post("asample", sampling_session_id="x", prompt={"tokens": [5]}).status_code == 404


def test_wrong_keys(server: ServerProcess) -> None:
    for key in (None, "", "tml-wrong", "tml-alic", "alice"):
        stranger = Wire(server.url, key)
        for path in (
            "client/config",
            "create_session",
            "retrieve_future",
            "forward_backward",
            "no/such/route",
        ):
            answer = stranger.post(path)
            assert answer.status_code == 401, (key, path)
            assert "key" in answer.json()["error"]
        assert stranger.http.get("/api/v1/healthz").json() == {"status": "ok"}
    bearer = Wire(server.url, None)
    bearer.http.headers["Authorization"] = f"Bearer {BOB}"
    assert bearer.post("create_session").status_code == 200


def test_another_keys_ids_do_not_exist(server: ServerProcess, model: Model) -> None:
    wire, bob = model.wire, Wire(server.url, BOB)
    saved = wire.result(wire.post("save_weights", model_id=model.id, seq_id=model.number(), path="mine"))
    named = wire.result(
        wire.post("save_weights_for_sampler", model_id=model.id, seq_id=model.number(), path="mine")
    )
    request = wire.forward_backward(model.id, model.number(), forward_only=True).json()["request_id"]
    session = model.id.partition(":")[0]
    assert bob.poll(request).status_code == bob.poll("req_unknown").status_code == 410
    theirs = [
        bob.forward_backward(model.id, 100),
        bob.optim_step(model.id, 100),
        bob.post("get_info", model_id=model.id),
        bob.post("save_weights", model_id=model.id, seq_id=100, path="theirs"),
        bob.post("session_heartbeat", session_id=session),
        bob.post(
            "create_model", session_id=session, model_seq_id=5, base_model="tiny", lora_config={"rank": 4}
        ),
        bob.post("load_weights", session_id=bob.session(), model_seq_id=0, path=saved["path"]),
        bob.post("weights_info", tinker_path=saved["path"]),
        bob.post(
            "create_sampling_session",
            session_id=bob.session(),
            sampling_session_seq_id=0,
            model_path=named["path"],
        ),
        bob.http.get(f"/api/v1/training_runs/{model.id}"),
        bob.http.get(f"/api/v1/sessions/{session}"),
        bob.http.delete(f"/api/v1/training_runs/{model.id}/checkpoints/weights/mine"),
    ]
    assert [answer.status_code for answer in theirs] == [404] * len(theirs)
    # Bob's refused operations did not use up numbers of the model, and its checkpoint is there.
    assert np.isfinite(model.loss())
    assert wire.post("weights_info", tinker_path=saved["path"]).status_code == 200
    # Published, it is everybody's to load.
    assert wire.post(f"training_runs/{model.id}/checkpoints/weights/mine/publish").status_code == 200
    assert bob.post("weights_info", tinker_path=saved["path"]).status_code == 200


def test_protobuf_answers_for_those_who_accept_them(model: Model) -> None:
    submitted = model.wire.forward_backward(model.id, model.number(), forward_only=True)
    model.wire.result(submitted)
    answer = model.wire.poll(submitted.json()["request_id"], PROTOBUF)
    assert answer.headers["content-type"] == PROTOBUF
    output = pb.ForwardBackwardOutput.FromString(answer.content)
    (record,) = output.loss_fn_outputs
    assert record.num_datums == 1
    assert np.frombuffer(record.fields["logprobs"].data, "<f4").shape == (4,)
