"""Tensors as clients send them, into the dense tensors of `engine.messages`.

Checked here: that bytes, dtype and shape agree. What the numbers mean is the engine's to judge.
"""

from __future__ import annotations

import math

import numpy as np

from ...engine import messages
from ..errors import BadRequest
from . import tinsmith_wire_pb2 as pb

_NUMPY_DTYPES: dict[int, tuple[messages.DType, np.dtype]] = {
    pb.DTYPE_FLOAT32: ("float32", np.dtype("<f4")),
    pb.DTYPE_INT64: ("int64", np.dtype("<i8")),
    pb.DTYPE_INT32: ("int32", np.dtype("<i4")),
}


class DenseAllowance:
    """How many elements the sparse tensors of one request may have once they are dense: a bomb ends here."""

    def __init__(self, elements: int = 1 << 26):
        self._left = elements

    def take(self, elements: int, where: str) -> None:
        if elements > self._left:
            raise BadRequest(f"{where}: {elements} elements once dense are over what one request may have")
        self._left -= elements


def dense_tensor(tensor: pb.Tensor, where: str, allowance: DenseAllowance) -> messages.Tensor:
    """Dense bytes with an explicit shape. An empty shape means one flat dimension.

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
    """bfloat16 is the upper half of a float32."""
    shape = _checked_shape(tensor, len(tensor.dense), 2, where)
    bits = np.frombuffer(tensor.dense, "<u2").astype("<u4") << np.uint32(16)
    return messages.Tensor("float32", shape, bits.astype("<u4").tobytes())


def _densified(
    tensor: pb.Tensor, name: messages.DType, dtype: np.dtype, where: str, allowance: DenseAllowance
) -> messages.Tensor:
    """Compressed sparse rows into a dense matrix; what is not listed is 0."""
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
