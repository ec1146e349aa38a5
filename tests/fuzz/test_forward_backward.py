"""Protobuf bodies, their tensors and provenance, and what the engine then checks: a value or a 4xx."""

from __future__ import annotations

import math
import random
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import pytest
import zstandard
from fuzz.campaign import campaign
from fuzz.mutations import FLOATS, INTEGERS, TEXTS, mutated_bytes
from tinsmith.engine import messages
from tinsmith.engine.errors import UserError
from tinsmith.engine.training import validation
from tinsmith.losses import REGISTRY
from tinsmith.server.errors import BadRequest, TooLarge
from tinsmith.server.models.losses import with_sampled_logprobs
from tinsmith.server.operations.operation import Operation
from tinsmith.server.wire import forward_backward as wire
from tinsmith.server.wire import tinsmith_wire_pb2 as pb

VOCAB, MAX_LENGTH, MAX_DATUMS = 64, 48, 6
ITEM_BYTES = {"float32": 4, "int64": 8, "int32": 4}
INPUTS = ("target_tokens", "weights", "logprobs", "advantages", "sequence_ratio_mask", "odd")
# What a sample was answered, as the ledger keeps it.
SAMPLED = messages.SampledSequence(
    np.arange(8, dtype="<i4").tobytes(), np.linspace(-3, -1, 8, dtype="<f4").tobytes(), "length"
)


@dataclass
class Answers:
    """The ledger's answers of samples, for provenance."""

    answer: messages.Answer = field(
        default_factory=lambda: messages.Done("sample", messages.SampleOutput([SAMPLED]), 0.0)
    )

    async def find(self, owner: str, request_id: str) -> Operation | None:
        if request_id != "sample":
            return None
        return Operation("sample", owner, "sample", "", 0, {}, None, self.answer)


def valid_request(rng: random.Random) -> pb.ForwardBackwardRequest:
    loss = rng.choice([*REGISTRY])
    request = pb.ForwardBackwardRequest(model_id="s:train:0", seq_id=rng.randint(1, 9), loss_fn=loss)
    for _ in range(rng.randint(1, 3)):
        datum = request.data.add()
        length = rng.randint(1, 10)
        tokens = np.array([rng.randrange(VOCAB) for _ in range(length)])
        datum.model_input.add().encoded_text.tokens = tokens.astype("<i4").tobytes()
        for name in REGISTRY[loss].required_inputs:
            values = tokens if name == "target_tokens" else np.linspace(-1, 1, length)
            _put(rng, datum.loss_fn_inputs[name], values, whole=name == "target_tokens")
        if rng.random() < 0.2:
            span = datum.loss_fn_input_spans.add().sampled_tokens
            span.sequence_id, span.offset, span.length = "sample:0", 0, min(length, 8)
            if length > 8:
                datum.loss_fn_input_spans.add().prompt_tokens.length = length - 8
    return request


def _put(rng: random.Random, tensor: pb.Tensor, values: np.ndarray, whole: bool) -> None:
    dtype, tensor.dtype = ("<i8", pb.DTYPE_INT64) if whole else ("<f4", pb.DTYPE_FLOAT32)
    if rng.random() < 0.8:
        tensor.dense = values.astype(dtype).tobytes()
        tensor.shape.extend(rng.choice(([], [len(values)])))
        return
    tensor.shape.extend([len(values), 1])
    tensor.sparse_csr.values = values.astype(dtype).tobytes()
    tensor.sparse_csr.crow_indices = np.arange(len(values) + 1, dtype="<i8").tobytes()
    tensor.sparse_csr.col_indices = np.zeros(len(values), "<i8").tobytes()


def change_request(rng: random.Random, request: pb.ForwardBackwardRequest) -> None:
    """One change that still is a ForwardBackwardRequest."""
    datum = rng.choice(request.data) if request.data else request.data.add()
    match rng.randrange(12):
        case 0:
            request.seq_id = rng.choice([n for n in INTEGERS if -(1 << 31) <= n < 1 << 31])
        case 1:
            request.loss_fn = rng.choice([*REGISTRY, "", "nothing", "\x00"])
        case 2:
            request.loss_fn_config[rng.choice(["epsilon", "clip_low_threshold", "x"])] = rng.choice(FLOATS)
        case 3:
            value = request.loss_fn_config_v2[rng.choice(["clip_high_threshold", "beta", ""])]
            if rng.random() < 0.5:
                value.number = rng.choice(FLOATS)
            elif rng.random() < 0.5:
                value.text = rng.choice(["", "1.0", "\x00"])
        case 4:
            chunk = datum.model_input.add()
            if rng.random() < 0.6:
                chunk.encoded_text.tokens = rng.randbytes(rng.choice((0, 1, 4, 6, 8, 4 * MAX_LENGTH)))
            elif rng.random() < 0.5:
                chunk.image.data = b"\x89PNG"
        case 5:
            request.data.extend([datum] * rng.randint(1, MAX_DATUMS))
        case 6:
            span = datum.loss_fn_input_spans.add()
            run = rng.choice((span.sampled_tokens, span.prompt_tokens))
            run.sequence_id = rng.choice(("sample:0", "sample:1", "sample:", "x:0", "", ":" * 9))
            run.offset, run.length = rng.choice(INTEGERS), rng.choice(INTEGERS)
        case 7:
            request.model_id = rng.choice([text for text in TEXTS if text != "\ud800"])
        case _:
            names = [*datum.loss_fn_inputs] if rng.random() < 0.9 else INPUTS
            _change_tensor(rng, datum.loss_fn_inputs[rng.choice(names or INPUTS)])


def _change_tensor(rng: random.Random, tensor: pb.Tensor) -> None:
    sparse = tensor.WhichOneof("encoding") == "sparse_csr"
    match rng.randrange(6):
        case 0:
            tensor.dtype = rng.choice((0, 1, 2, 3, 4, 5, 99, -1))
        case 1:
            del tensor.shape[:]
            tensor.shape.extend(rng.choice(INTEGERS) for _ in range(rng.randrange(4)))
        case 2 if tensor.shape:
            tensor.shape[rng.randrange(len(tensor.shape))] = rng.choice(INTEGERS)
        case 3 if not sparse:
            tensor.dense = _numbers(rng) if rng.random() < 0.5 else mutated_bytes(rng, tensor.dense, 2)
        case _:
            csr = tensor.sparse_csr
            name = rng.choice(("values", "crow_indices", "col_indices"))
            if rng.random() < 0.6:
                numbers = np.frombuffer(getattr(csr, name)[: len(getattr(csr, name)) // 8 * 8], "<i8").copy()
                for _ in range(rng.randint(1, 3) if len(numbers) else 0):
                    numbers[rng.randrange(len(numbers))] = rng.choice(INTEGERS)
                setattr(csr, name, numbers.tobytes())
            else:
                setattr(csr, name, _numbers(rng))


def _numbers(rng: random.Random) -> bytes:
    count = rng.randrange(6)
    if rng.random() < 0.3:
        return np.array([rng.choice(FLOATS) for _ in range(count)], np.float64).astype("<f4").tobytes()
    return np.array([rng.choice(INTEGERS) for _ in range(count)], "<i8").tobytes()


@np.errstate(over="ignore")
def body(rng: random.Random) -> bytes:
    request = valid_request(rng)
    for _ in range(rng.randrange(4)):
        change_request(rng, request)
    data = request.SerializeToString()
    return mutated_bytes(rng, data) if rng.random() < 0.3 else data


@campaign(body)
def test_forward_backward_bodies(data: bytes) -> None:
    wire.peek(data)
    try:
        decoded = wire.decode(data, MAX_DATUMS)
        wire.check_rows(decoded)
    except (BadRequest, TooLarge):
        return
    assert 0 < len(decoded.data) == len(decoded.spans) <= MAX_DATUMS
    assert all(math.isfinite(value) for value in decoded.loss_config.values())
    for datum in decoded.data:
        assert len(datum.tokens) > 0
        assert len(datum.tokens) % 4 == 0
        for tensor in datum.inputs.values():
            assert len(tensor.data) == math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
            assert tensor.shape[0] == len(datum.tokens) // 4
    try:
        filled = _at_once(with_sampled_logprobs(Answers(), "owner", decoded.data, decoded.spans))
    except BadRequest:
        filled = decoded.data
    message = messages.ForwardBackward(
        "r", decoded.model_id, filled, decoded.loss_fn, decoded.loss_config, decoded.forward_only
    )
    assert messages.decode_to_engine(messages.encode(message)) == message
    try:
        loss = validation.check_loss(message.loss_fn, message.loss_config)
        checked = validation.check_data(message.data, loss, VOCAB, MAX_LENGTH)
    except UserError:
        return
    for datum in checked:
        assert 0 < len(datum.tokens) <= MAX_LENGTH
        assert ((datum.tokens >= 0) & (datum.tokens < VOCAB)).all()
        assert ((datum.targets >= 0) & (datum.targets < VOCAB)).all()
        assert all(np.isfinite(array).all() for array in datum.inputs.values())
        assert all(array.shape == datum.targets.shape for array in datum.inputs.values())


def _at_once(coroutine):
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


LIMIT = 20_000  # bytes of a decompressed body


def compressed(rng: random.Random) -> tuple[bytes, bytes | None]:
    """A body, and what it holds if it is whole."""
    size = rng.choice((0, 1, 100, LIMIT - 1, LIMIT, LIMIT + 1, 40 * LIMIT))
    plain = bytes(size) if rng.random() < 0.5 else rng.randbytes(min(size, 2 * LIMIT))
    compressor = zstandard.ZstdCompressor(level=rng.choice((1, 3)), write_checksum=rng.random() < 0.5)
    if rng.random() < 0.3:
        stream = compressor.compressobj()  # without the size in its header
        frame = stream.compress(plain) + stream.flush()
    else:
        frame = compressor.compress(plain)
    if rng.random() < 0.3:
        return frame, plain
    return mutated_bytes(rng, frame), None


@campaign(compressed)
def test_zstd_bodies(case: tuple[bytes, bytes | None]) -> None:
    data, plain = case
    if plain is not None and len(plain) > LIMIT:
        with pytest.raises(TooLarge):
            wire.decompress(data, "zstd", LIMIT)
    elif plain is not None:
        assert wire.decompress(data, "zstd", LIMIT) == plain
    else:
        with suppress(BadRequest, TooLarge):
            assert len(wire.decompress(data, "zstd", LIMIT)) <= LIMIT


def test_a_truncated_zstd_body_is_refused() -> None:
    frame = zstandard.ZstdCompressor().compress(random.Random(1).randbytes(300_000))
    for cut in (0, 4, 20, 1000, 150_000, len(frame) - 1):
        with pytest.raises(BadRequest):
            wire.decompress(frame[:cut], "zstd", 1 << 20)


def test_indices_whose_differences_overflow_are_refused() -> None:
    """int64 wraps around: [0, 2^63 - 1, -2, 0] seems to ascend, and its sum to be 0."""
    request = pb.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    datum = request.data.add()
    datum.model_input.add().encoded_text.tokens = bytes(12)
    tensor = datum.loss_fn_inputs["weights"]
    tensor.dtype = pb.DTYPE_FLOAT32
    tensor.shape.extend([3, 1])
    tensor.sparse_csr.crow_indices = np.array([0, (1 << 63) - 1, -2, 0], "<i8").tobytes()
    with pytest.raises(BadRequest, match="crow_indices must be 4 ascending numbers"):
        wire.decode(request.SerializeToString(), 10)


@pytest.mark.parametrize(
    "field",
    [b"\x1a\x00", b"\x1a\x04\x0a\x02\x0a\x00", b"\x2a\x00", b"\x10\x01"],
    ids=["datums", "chunks", "loss config", "numbers"],
)
def test_a_body_of_very_many_fields_is_refused_before_it_is_parsed(field: bytes) -> None:
    """They would take tens of times their bytes in memory."""
    frame = zstandard.ZstdCompressor().compress(field * ((8 << 20) // len(field)))
    assert len(frame) < 10_000
    with pytest.raises(BadRequest, match="protobuf fields"):
        wire.decode(wire.decompress(frame, "zstd", 64 << 20), 1 << 30)


def test_a_large_honest_body_has_few_fields() -> None:
    request = pb.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    datum = request.data.add()
    datum.model_input.add().encoded_text.tokens = bytes(4 << 20)
    datum.loss_fn_inputs["target_tokens"].dense = bytes(8 << 20)
    datum.loss_fn_inputs["target_tokens"].dtype = pb.DTYPE_INT64
    assert len(wire.decode(request.SerializeToString(), 1).data[0].tokens) == 4 << 20
