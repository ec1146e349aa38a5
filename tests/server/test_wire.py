"""The protobuf codecs, against the SDK's own, and against noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinsmith.engine import messages
from tinsmith.server.errors import ApiError, BadRequest
from tinsmith.server.wire import forward_backward, results, sample_requests
from tinsmith.server.wire import tinsmith_wire_pb2 as pb


def body(**fields) -> pb.ForwardBackwardRequest:
    request = pb.ForwardBackwardRequest(model_id="s:train:0", seq_id=3, loss_fn="cross_entropy")
    datum = request.data.add()
    datum.model_input.add().encoded_text.tokens = np.arange(4, dtype="<i4").tobytes()
    for name, value in fields.items():
        datum.loss_fn_inputs[name].CopyFrom(value)
    return request


def decode(request: pb.ForwardBackwardRequest) -> forward_backward.ForwardBackwardBody:
    return forward_backward.decode(request.SerializeToString(), max_datums=10)


def dense(values, dtype=pb.DTYPE_FLOAT32, shape=None, numpy="<f4") -> pb.Tensor:
    array = np.asarray(values, numpy)
    return pb.Tensor(dense=array.tobytes(), dtype=dtype, shape=array.shape if shape is None else shape)


def test_the_numbers_of_the_fields_are_the_sdks() -> None:
    """Each message of the SDK's that we have has the same fields, under the same numbers and types."""
    sdk = pytest.importorskip("tinker.proto.tinker_public_pb2")
    for name, ours in pb.DESCRIPTOR.message_types_by_name.items():
        theirs = sdk.DESCRIPTOR.message_types_by_name[name]
        assert {(f.name, f.number, f.type) for f in ours.fields} == {
            (f.name, f.number, f.type) for f in theirs.fields
        }, name
    for name, ours in pb.DESCRIPTOR.enum_types_by_name.items():
        theirs = sdk.DESCRIPTOR.enum_types_by_name[name]
        assert {(v.name, v.number) for v in ours.values} == {(v.name, v.number) for v in theirs.values}


def test_an_empty_shape_is_one_dimension() -> None:
    decoded = decode(body(weights=dense([1, 2, 3, 4], shape=[])))
    assert decoded.data[0].inputs["weights"].shape == (4,)
    assert (decoded.model_id, decoded.seq_id, decoded.loss_fn) == ("s:train:0", 3, "cross_entropy")


def test_chunks_are_joined() -> None:
    request = body()
    request.data[0].model_input.add().encoded_text.tokens = np.array([9], "<i4").tobytes()
    assert np.frombuffer(decode(request).data[0].tokens, "<i4").tolist() == [0, 1, 2, 3, 9]


def test_bfloat16_is_widened_exactly() -> None:
    values = np.array([1.0, -2.5, 3.0e38, 0.0], "<f4")
    bits = (values.view("<u4") >> 16).astype("<u2")
    tensor = pb.Tensor(dense=bits.tobytes(), dtype=pb.DTYPE_BFLOAT16, shape=[4])
    decoded = decode(body(weights=tensor)).data[0].inputs["weights"]
    expected = (bits.astype("<u4") << 16).view("<f4")
    np.testing.assert_array_equal(np.frombuffer(decoded.data, "<f4"), expected)


@given(st.integers(1, 5), st.data())
@settings(max_examples=100, deadline=None)
def test_sparse_rows_become_dense(columns: int, data: st.DataObject) -> None:
    matrix = np.array(
        [[data.draw(st.sampled_from([0.0, 0.0, 1.5, -2.0])) for _ in range(columns)] for _ in range(4)], "<f4"
    )
    rows, cols = np.nonzero(matrix)
    sparse = pb.SparseCsr(
        values=matrix[rows, cols].tobytes(),
        crow_indices=np.searchsorted(rows, np.arange(5)).astype("<i8").tobytes(),
        col_indices=cols.astype("<i8").tobytes(),
    )
    decoded = decode(body(weights=pb.Tensor(sparse_csr=sparse, dtype=pb.DTYPE_FLOAT32, shape=matrix.shape)))
    tensor = decoded.data[0].inputs["weights"]
    assert tensor.shape == matrix.shape
    np.testing.assert_array_equal(np.frombuffer(tensor.data, "<f4").reshape(matrix.shape), matrix)


def test_the_newer_loss_config_wins() -> None:
    request = body()
    request.loss_fn_config["beta"] = 1.0
    request.loss_fn_config_v2["beta"].number = 2.0
    request.loss_fn_config["other"] = 3.0
    assert decode(request).loss_config == {"beta": 2.0, "other": 3.0}
    request.loss_fn_config_v2["loss_id"].text = "x"
    with pytest.raises(BadRequest, match="loss_id"):
        decode(request)


def test_too_many_datums() -> None:
    request = body()
    for _ in range(10):
        request.data.append(request.data[0])
    with pytest.raises(BadRequest, match="limit of 10"):
        decode(request)


def status_of(attempt: Callable[[], object]) -> int:
    """Return the status that a client sees; any other exception would be a 500."""
    try:
        attempt()
    except ApiError as error:
        return error.status
    return 200


@given(st.binary(max_size=400))
@settings(max_examples=1000, deadline=None)
def test_noise_is_refused_in_words(noise: bytes) -> None:
    assert status_of(lambda: forward_backward.decode(noise, 10)) in (200, 400)
    assert status_of(lambda: forward_backward.decompress(noise, "zstd", 1 << 20)) in (200, 400, 413)
    forward_backward.peek(noise)


@given(st.data())
@settings(max_examples=500, deadline=None)
def test_damaged_requests_are_refused_in_words(data: st.DataObject) -> None:
    good = bytearray(body(weights=dense([1, 2, 3, 4]), extra=dense([[1], [2], [3], [4]])).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    assert status_of(lambda: forward_backward.decode(bytes(good[:cut]), 10)) in (200, 400)


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=127), st.integers(1, (1 << 31) - 1))
def test_model_and_number_are_read_before_the_damage(model: str, seq_id: int) -> None:
    whole = pb.ForwardBackwardRequest(model_id=model, seq_id=seq_id, loss_fn="x").SerializeToString()
    assert forward_backward.peek(whole[:-2] + b"\xff") == (model, seq_id)


def test_outputs_are_read_back_by_the_sdk() -> None:
    pytest.importorskip("torch")
    conversion = pytest.importorskip("tinker.proto.response_conv")
    arrays = [np.arange(3, dtype="<f4"), np.arange(8, dtype="<f4").reshape(4, 2), np.ones(2, "<f4")]
    output = messages.ForwardBackwardOutput(
        [messages.Tensor("float32", array.shape, array.tobytes()) for array in arrays], {"loss:sum": 1.5}
    )
    serialized = results.as_protobuf(output)
    read = conversion.deserialize_forward_backward_output(serialized)
    assert read.metrics == {"loss:sum": 1.5}
    for datum, array in zip(read.loss_fn_outputs, arrays, strict=True):
        assert list(datum["logprobs"].shape) == list(array.shape)
        np.testing.assert_array_equal(np.reshape(datum["logprobs"].data, array.shape), array)
    as_json = results.as_json(output)["loss_fn_outputs"]
    assert as_json[1]["logprobs"] == {"data": list(range(8)), "dtype": "float32", "shape": [4, 2]}


def test_samples_are_read_back_by_the_sdk_and_are_the_same_in_json() -> None:
    conversion = pytest.importorskip("tinker.proto.response_conv")
    tensor_data = pytest.importorskip("tinker.types.tensor_data").TensorData

    def of(values: list, dtype: str = "<f4") -> bytes:
        return np.array(values, dtype).tobytes()

    topk = messages.TopK(of([[7, 9], [8, 0]], "<i4"), of([[-0.5, -1], [-1.5, -99999]]), k=2, length=2)
    prompt_topk = messages.TopK(of([[0], [0], [4]], "<i4"), of([[-99999], [-3], [-0.5]]), k=1, length=3)
    output = messages.SampleOutput(
        [messages.SampledSequence(of([7, 8], "<i4"), of([-0.5, -1.5]), "length", topk)],
        prompt_logprobs=of([np.nan, -2.0, -1.0]),
        topk_prompt_logprobs=prompt_topk,
        prompt_cache_hit_tokens=2,
        prompt_targets=messages.PromptCells((2, 2), of([-1.0, 0.0, -2.0, -4.0])),
        prompt_alternatives=messages.PromptAlternatives(of([1, 2, 3, 4], "<i4"), of([-1, -2, -3, -4]), k=2),
    )
    read = conversion.deserialize_sample_response(results.as_protobuf(output))
    (sequence,) = read.sequences
    assert (list(sequence.tokens), sequence.stop_reason) == ([7, 8], "length")
    assert sequence.topk_logprobs == [[(7, -0.5), (9, -1.0)], [(8, -1.5)]]
    assert list(read.prompt_logprobs) == [None, -2.0, -1.0]
    assert read.topk_prompt_logprobs == [None, [(0, -3.0)], [(4, -0.5)]]
    assert read.target_prompt_logprobs.to_numpy().tolist() == [[-1.0, 0.0], [-2.0, -4.0]]
    assert read.prompt_alt_tokens.tokens.to_numpy().tolist() == [[1, 2], [3, 4]]

    as_json = orjson.loads(orjson.dumps(results.as_json(output)))
    (said,) = as_json["sequences"]
    assert said == {
        "stop_reason": "length",
        "finish_reason": "length",
        "tokens": [7, 8],
        "logprobs": [-0.5, -1.5],
        "topk_sampled_logprobs": [[[7, -0.5], [9, -1.0]], [[8, -1.5]]],
    }
    assert as_json["prompt_logprobs"] == read.prompt_logprobs
    assert as_json["topk_prompt_logprobs"] == [None, [[0, -3.0]], [[4, -0.5]]]
    assert as_json["prompt_cache_hit_tokens"] == read.prompt_cache_hit_tokens == 2
    for said, theirs in (
        (as_json["target_prompt_logprobs"], read.target_prompt_logprobs),
        (as_json["prompt_alt_tokens"]["tokens"], read.prompt_alt_tokens.tokens),
        (as_json["prompt_alt_tokens"]["logprobs"], read.prompt_alt_tokens.logprobs),
    ):
        assert said["dtype"] == theirs.dtype
        np.testing.assert_array_equal(tensor_data(**said).to_numpy(), theirs.to_numpy())


def test_sparse_target_log_probs_keep_their_layout_in_protobuf_and_json() -> None:
    conversion = pytest.importorskip("tinker.proto.response_conv")
    crow, cols = [0, 1, 1, 3], [2, 0, 3]
    cells = messages.PromptCells(
        (3, 4),
        np.array([-1.0, -2.0, -3.0], "<f4").tobytes(),
        *(np.array(indices, "<i8").tobytes() for indices in (crow, cols)),
    )
    output = messages.SampleOutput([], prompt_targets=cells)
    said = results.as_json(output)["target_prompt_logprobs"]
    read = conversion.deserialize_sample_response(results.as_protobuf(output)).target_prompt_logprobs
    for layout in (said, vars(read)):
        assert list(layout["shape"]) == [3, 4]
        assert (layout["sparse_crow_indices"], layout["sparse_col_indices"]) == (crow, cols)
    assert said["data"] == read.data == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("repetition_penalty", [0, -1, 101, "NaN"], 1.3),
        ("presence_penalty", [-2.1, 2.1], -1.5),
        ("frequency_penalty", [-2.1, 2.1], 2),
        ("min_p", [-0.1, 1.1], 0.05),
    ],
)
def test_extensions_of_the_sampling_parameters(name: str, wrong: list, right: float) -> None:
    for value in wrong:
        with pytest.raises(ValueError, match=name):
            sample_requests.SamplingParams(**{name: value})
    assert getattr(sample_requests.SamplingParams(**{name: right}).message(), name) == right
    assert sample_requests.SamplingParams().message() == messages.SamplingParams(), "off by default"


def test_seeds_have_64_bits() -> None:
    """Any integer is one, and all of 64 bits are different ones, on the way to the engine too."""
    sent = [0, 5, 5 + (1 << 63) - 1, (1 << 64) - 1, -2, (1 << 64) + 7]
    seeds = []
    for seed in sent:
        params = sample_requests.SamplingParams(seed=seed).message()
        sample = messages.Sample("r", messages.SamplerRef("tiny"), b"", 1, params)
        seeds.append(messages.decode_to_engine(messages.encode(sample)).params.seed)
    assert seeds == [0, 5, 5 + (1 << 63) - 1, (1 << 64) - 1, (1 << 64) - 2, 7]
