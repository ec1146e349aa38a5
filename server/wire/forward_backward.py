"""Reads the protobuf `ForwardBackwardRequest` into the fields of `messages.ForwardBackward`, with dense
tensors.

Whether bytes, dtype and shape agree is checked here; what the numbers mean is checked by the engine. The
fields of a body are counted before it is parsed, because one of 2 bytes may take 50 in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import zstandard
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from ...engine import messages
from ..errors import BadRequest, TooLarge
from . import tinsmith_wire_pb2 as pb

_NUMPY_DTYPES: dict[int, tuple[messages.DType, np.dtype]] = {
    pb.DTYPE_FLOAT32: ("float32", np.dtype("<f4")),
    pb.DTYPE_INT64: ("int64", np.dtype("<i8")),
    pb.DTYPE_INT32: ("int32", np.dtype("<i4")),
}
_DENSE = {code: (name, dtype.itemsize) for code, (name, dtype) in _NUMPY_DTYPES.items()}


@dataclass
class DenseAllowance:
    """Limits how many elements the sparse tensors of one request have once they are dense."""

    elements: int = 1 << 26

    def take(self, elements: int, where: str) -> None:
        if elements > self.elements:
            raise BadRequest(f"{where}: {elements} elements once dense are over what one request may have")
        self.elements -= elements


def dense_tensor(tensor: pb.Tensor, where: str, allowance: DenseAllowance) -> messages.Tensor:
    """Read a tensor into dense bytes with an explicit shape. An empty shape means one flat dimension.

    `where` names datum and field for the message. Raises BadRequest.
    """
    encoding = tensor.WhichOneof("encoding")
    if encoding is None:
        raise BadRequest(f"{where}: the tensor has no values; send `dense` or `sparse_csr`")
    if tensor.dtype == pb.DTYPE_BFLOAT16 and encoding == "dense":
        return _widened(tensor, where)
    if tensor.dtype not in _NUMPY_DTYPES:
        raise BadRequest(
            f"{where}: unsupported dtype {_dtype_name(tensor.dtype)}; use float32, int64 or int32"
        )
    name, dtype = _NUMPY_DTYPES[tensor.dtype]
    if encoding == "sparse_csr":
        return _densified(tensor, name, dtype, where, allowance)
    data = tensor.dense
    return messages.Tensor(name, _checked_shape(tensor, len(data), dtype.itemsize, where), data)


def _dtype_name(dtype: int) -> str:
    try:
        return pb.DType.Name(dtype).removeprefix("DTYPE_").lower()
    except ValueError:
        return str(dtype)


def _checked_shape(tensor: pb.Tensor, num_bytes: int, itemsize: int, where: str) -> tuple[int, ...]:
    if num_bytes % itemsize:
        raise BadRequest(
            f"{where}: {num_bytes} bytes are not a whole number of {_dtype_name(tensor.dtype)} values"
        )
    shape = tuple(tensor.shape) or (num_bytes // itemsize,)
    if len(shape) > 2 or min(shape) < 0:
        raise BadRequest(f"{where}: shape {list(shape)} is not that of a vector [N] or a matrix [N, K]")
    if math.prod(shape) * itemsize != num_bytes:
        raise BadRequest(
            f"{where}: shape {list(shape)} needs {math.prod(shape)} values, got {num_bytes // itemsize}"
        )
    return shape


def _widened(tensor: pb.Tensor, where: str) -> messages.Tensor:
    """Read bfloat16, which is the upper half of a float32."""
    shape = _checked_shape(tensor, len(tensor.dense), 2, where)
    bits = np.frombuffer(tensor.dense, "<u2").astype("<u4") << np.uint32(16)
    return messages.Tensor("float32", shape, bits.astype("<u4").tobytes())


def _densified(
    tensor: pb.Tensor, name: messages.DType, dtype: np.dtype, where: str, allowance: DenseAllowance
) -> messages.Tensor:
    """Read compressed sparse rows into a dense matrix; values that are not listed are 0."""
    sparse = tensor.sparse_csr
    shape = tuple(tensor.shape)
    if len(shape) != 2 or min(shape) < 0:
        raise BadRequest(f"{where}: a sparse tensor needs a shape [N, K], got {list(shape)}")
    rows, columns = shape
    allowance.take(rows * columns, where)
    if len(sparse.values) % dtype.itemsize or len(sparse.crow_indices) % 8 or len(sparse.col_indices) % 8:
        raise BadRequest(f"{where}: sparse values or indices are cut off in the middle of a number")
    values = np.frombuffer(sparse.values, dtype)
    crow = np.frombuffer(sparse.crow_indices, "<i8")
    cols = np.frombuffer(sparse.col_indices, "<i8")
    check_csr(len(values), (rows, columns), crow, cols, where)
    if rows == 0:  # NumPy refuses an empty array with a side of 2^62
        return messages.Tensor(name, (rows, columns), b"")
    dense = np.zeros(shape, dtype)
    row_of_value = np.repeat(np.arange(rows), np.diff(crow))
    dense[row_of_value, cols] = values
    return messages.Tensor(name, (rows, columns), dense.tobytes())


def check_csr(
    num_values: int, shape: tuple[int, int], crow: np.ndarray, cols: np.ndarray, where: str
) -> None:
    """Raise BadRequest unless the int64 indices are those of compressed sparse rows of that shape."""
    rows, columns = shape
    if min(rows, columns) < 0:
        raise BadRequest(f"{where}: shape {[rows, columns]} has a negative size")
    # Neighbours are compared and not subtracted: a difference can wrap around and look ascending.
    if len(crow) != rows + 1 or crow[0] != 0 or (crow[1:] < crow[:-1]).any() or crow[-1] != num_values:
        raise BadRequest(
            f"{where}: crow_indices must be {rows + 1} ascending numbers from 0 to the number of values "
            f"({num_values})"
        )
    if len(cols) != num_values:
        raise BadRequest(f"{where}: {len(cols)} col_indices for {num_values} values")
    if len(cols) and (cols.min() < 0 or cols.max() >= columns):
        raise BadRequest(f"{where}: col_indices must lie in [0, {columns})")


UNCOUNTED_BYTES = 4 << 20  # a body up to this is small also when it is parsed
MAX_FIELDS = 1 << 20  # the largest honest request, 16 384 datums, has less than half


def check_field_count(body: bytes, descriptor: Descriptor, limit: int = MAX_FIELDS) -> None:
    """Raise BadRequest if `body` and the messages in it have more than `limit` fields. Malformed bodies
    pass."""
    waiting = [(0, len(body), descriptor)]
    count = 0
    while waiting:
        at, end, message = waiting.pop()
        kinds = message.fields_by_number
        while at < end:
            count += 1
            if count > limit:
                raise BadRequest(f"the body has over {limit} protobuf fields; send fewer datums per request")
            tag, at = _skip_varint(body, at)
            wire_type = tag & 7
            if wire_type == 2:  # bytes, or a message
                size, at = _skip_varint(body, at)
                field = kinds.get(tag >> 3) if size else None
                if field is not None and field.message_type is not None:
                    waiting.append((at, min(at + size, end), field.message_type))
                at += size
            elif wire_type == 0:
                _, at = _skip_varint(body, at)
            elif wire_type == 1:
                at += 8
            elif wire_type == 5:
                at += 4
            # Else it is the begin or the end of a group, whose fields follow.


def _skip_varint(body: bytes, at: int) -> tuple[int, int]:
    """Return the number at `at` and the place after it; the body's end if there is no whole number."""
    value = 0
    for shift, byte in enumerate(body[at : at + 10]):
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value, at + shift + 1
    return 0, len(body)


_MAX_WINDOW_BYTES = 1 << 27
CUSTOM = "custom"  # the loss_fn of uploaded losses
WORDS = frozenset({"kl_type", "ratio_type"})  # values of loss_fn_config that are no numbers
_PIECE_BYTES = 1 << 10  # of a compressed body; at most 32 MiB come out of one


@dataclass(frozen=True)
class Span:
    """A run of target tokens that come from a sampled sequence: of its prompt, or of what was sampled."""

    sequence_id: str
    offset: int
    length: int
    sampled: bool


@dataclass(frozen=True)
class ForwardBackwardBody:
    """A body that was read and checked. `spans`: for each datum, runs that tile its targets, if the client
    sent any."""

    model_id: str
    seq_id: int
    data: list[messages.Datum]
    spans: list[list[Span]]
    loss_fn: str
    loss_config: dict[str, messages.LossValue]
    forward_only: bool
    loss_id: str | None = None  # of loss_fn `custom`


def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Undo a body's `Content-Encoding`. Raises BadRequest, and TooLarge for more than `max_bytes`."""
    if encoding in ("", "identity"):
        return body
    if encoding != "zstd":
        raise BadRequest(f"unsupported Content-Encoding {encoding!r}; use zstd or none")
    try:
        declared = zstandard.get_frame_parameters(body).content_size
        if declared != zstandard.CONTENTSIZE_UNKNOWN and declared > max_bytes:
            raise TooLarge(
                f"the decompressed body of {declared} bytes is over the limit of {max_bytes} bytes"
            )
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        if declared != zstandard.CONTENTSIZE_UNKNOWN:
            return decompressor.decompress(body, allow_extra_data=False)
        return _decompress_stream(decompressor, body, max_bytes)
    except (zstandard.ZstdError, MemoryError) as error:
        raise BadRequest(f"the body is not valid zstd: {error}") from None


def _decompress_stream(decompressor: zstandard.ZstdDecompressor, body: bytes, max_bytes: int) -> bytes:
    """Decompress one frame that does not declare its size."""
    stream = decompressor.decompressobj()
    parts, size = [], 0
    for at in range(0, len(body), _PIECE_BYTES):
        parts.append(stream.decompress(body[at : at + _PIECE_BYTES]))
        size += len(parts[-1])
        if size > max_bytes:
            raise TooLarge(f"the decompressed body is over the limit of {max_bytes} bytes")
        if stream.eof:
            break
    if not stream.eof or stream.unused_data or at + _PIECE_BYTES < len(body):
        raise BadRequest("the body is not one whole zstd frame")
    return b"".join(parts)


def peek(body: bytes) -> tuple[str | None, int | None]:
    """Return model_id and seq_id, the first two fields of a body, which may be damaged further on."""
    model_id, at = None, 0
    if body[:1] == b"\x0a":  # field 1, length-delimited
        size, begin = _varint(body, 1)
        at = begin + size
        try:
            model_id = body[begin:at].decode()
        except UnicodeDecodeError:
            return None, None
    seq_id, end = _varint(body, at + 1) if body[at : at + 1] == b"\x10" else (None, at)  # field 2
    return model_id, seq_id if end <= len(body) else None


def _varint(body: bytes, at: int) -> tuple[int, int]:
    """Return the number at `at` and where it ends; a place behind the body if it is not whole, or not of 32
    bits."""
    value = 0
    for shift, byte in enumerate(body[at : at + 5]):
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value, at + shift + 1
    return 0, len(body) + 1


def decode(body: bytes, max_datums: int) -> ForwardBackwardBody:
    """Read a protobuf body. Raises BadRequest naming datum and field."""
    if len(body) > UNCOUNTED_BYTES:
        check_field_count(body, pb.ForwardBackwardRequest.DESCRIPTOR)
    try:
        request = pb.ForwardBackwardRequest.FromString(body)
    except DecodeError:
        raise BadRequest(
            f"the body of {len(body)} bytes is not a ForwardBackwardRequest: truncated or not protobuf"
        ) from None
    return checked(request, max_datums)


def checked(request: pb.ForwardBackwardRequest, max_datums: int) -> ForwardBackwardBody:
    """Check a message, and return it as a body. Raises BadRequest naming datum and field."""
    if len(request.data) > max_datums:
        raise BadRequest(f"data: {len(request.data)} datums are over the limit of {max_datums} per request")
    if not request.data:
        raise BadRequest("data: empty; send at least one datum")
    if not request.loss_fn:
        raise BadRequest("loss_fn: missing; name a loss, for example 'cross_entropy'")
    allowance = DenseAllowance()
    is_custom = request.loss_fn == CUSTOM
    has_config = bool(request.loss_fn_config or request.loss_fn_config_v2) and not is_custom
    return ForwardBackwardBody(
        model_id=request.model_id,
        seq_id=request.seq_id,
        data=[_datum(datum, index, allowance) for index, datum in enumerate(request.data)],
        spans=[_spans(datum) if datum.loss_fn_input_spans else [] for datum in request.data],
        loss_fn=request.loss_fn,
        loss_config=_loss_config(request) if has_config else {},
        forward_only=request.forward_only,
        loss_id=_loss_id(request) if is_custom else None,
    )


def _datum(datum: pb.Datum, index: int, allowance: DenseAllowance) -> messages.Datum:
    """Read a datum. Chunks of whole tokens and dense tensors with their own shape need nothing else."""
    chunks = datum.model_input
    pieces = [chunk.encoded_text.tokens for chunk in chunks if chunk.HasField("encoded_text")]
    if len(pieces) != len(chunks) or any(len(piece) % 4 for piece in pieces):
        _refuse_chunks(datum, index)
    inputs = {}
    for name, tensor in sorted(datum.loss_fn_inputs.items()):
        dtype, itemsize = _DENSE.get(tensor.dtype, (None, 1))
        shape, data = tuple(tensor.shape), tensor.dense
        count, rest = divmod(len(data), itemsize)
        has_shape = not shape or (len(shape) < 3 and min(shape) > 0 and math.prod(shape) == count)
        if dtype is not None and count and not rest and has_shape:
            inputs[name] = messages.Tensor(dtype, shape or (count,), data)
        else:
            inputs[name] = dense_tensor(tensor, f"datum {index}: loss_fn_inputs[{name!r}]", allowance)
    tokens = b"".join(pieces)
    if not tokens:
        raise BadRequest(f"datum {index}: model_input: no tokens; send at least one")
    return messages.Datum(tokens, inputs)


def _refuse_chunks(datum: pb.Datum, index: int) -> NoReturn:
    """Raise BadRequest for the first chunk that is not whole tokens."""
    for chunk_index, chunk in enumerate(datum.model_input):
        kind = chunk.WhichOneof("chunk")
        where = f"datum {index}: model_input chunk {chunk_index}"
        if kind is None:
            raise BadRequest(f"{where}: empty; send encoded_text")
        if kind != "encoded_text":
            raise BadRequest(f"{where}: {kind} is not supported by this server's models; send encoded_text")
        if len(chunk.encoded_text.tokens) % 4:
            raise BadRequest(f"{where}: {len(chunk.encoded_text.tokens)} bytes are not whole int32 tokens")
    raise AssertionError


def _spans(datum: pb.Datum) -> list[Span]:
    spans = []
    for span in datum.loss_fn_input_spans:
        sampled = span.WhichOneof("span") == "sampled_tokens"
        run = span.sampled_tokens if sampled else span.prompt_tokens
        spans.append(Span(run.sequence_id, run.offset, run.length, sampled))
    return spans


def check_rows(body: ForwardBackwardBody) -> None:
    """Raise BadRequest unless every input has one row per token. Inputs that only a custom loss reads may
    have any number."""
    custom = body.loss_id is not None
    for index, datum in enumerate(body.data):
        length = len(datum.tokens) // 4
        for name, tensor in datum.inputs.items():
            if tensor.shape[0] != length and (name == "target_tokens" or not custom):
                raise BadRequest(
                    f"datum {index}: loss_fn_inputs[{name!r}]: {tensor.shape[0]} rows for {length} tokens "
                    "of model_input; position i of the input belongs to token i, so both have the same length"
                )


def _loss_id(request: pb.ForwardBackwardRequest) -> str:
    config = request.loss_fn_config_v2
    if (
        set(config) != {"loss_id"}
        or request.loss_fn_config
        or config["loss_id"].WhichOneof("value") != "text"
    ):
        raise BadRequest("loss_fn_config: loss 'custom' takes loss_id alone, the text of create_custom_loss")
    return config["loss_id"].text


def _loss_config(request: pb.ForwardBackwardRequest) -> dict[str, messages.LossValue]:
    config: dict[str, messages.LossValue] = dict(request.loss_fn_config)
    for key, value in request.loss_fn_config_v2.items():
        text = value.text if value.WhichOneof("value") != "number" else None
        if text is not None and key not in WORDS:
            raise BadRequest(f"loss_fn_config: {key}: {text[:64]!r} is not a number; this value must be one")
        config[key] = value.number if text is None else text[:64]
    for key, number in config.items():
        if isinstance(number, float) and not math.isfinite(number):
            raise BadRequest(f"loss_fn_config: {key}: {number} is not a finite number")
    return config
