"""Answers of the engine as bodies: protobuf for those who accept it, JSON otherwise."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from ...engine import messages
from . import tinsmith_wire_pb2 as pb

PROTOBUF = "application/x-protobuf"
OUTPUT_TYPE = "ArrayRecord"
_DTYPES = {"float32": pb.DTYPE_FLOAT32, "int64": pb.DTYPE_INT64, "int32": pb.DTYPE_INT32}
_NUMPY = {"float32": "<f4", "int64": "<i8", "int32": "<i4"}


def as_protobuf(output: messages.Output) -> bytes | None:
    """Serialized, or None for outputs that are JSON in every dialect."""
    if isinstance(output, messages.ForwardBackwardOutput):
        return _forward_backward(output).SerializeToString()
    if isinstance(output, messages.SampleOutput):
        return _sample(output).SerializeToString()
    return None


def _forward_backward(output: messages.ForwardBackwardOutput) -> pb.ForwardBackwardOutput:
    body = pb.ForwardBackwardOutput(loss_fn_output_type=OUTPUT_TYPE)
    body.metrics.update(output.metrics)
    # One record per run of datums that agree in dtype and trailing shape.
    for (dtype, trailing), group in itertools.groupby(
        output.logprobs, key=lambda tensor: (tensor.dtype, tensor.shape[1:])
    ):
        tensors = list(group)
        record = body.loss_fn_outputs.add(type_tag=OUTPUT_TYPE, num_datums=len(tensors))
        field = record.fields["logprobs"]
        field.dtype = _DTYPES[dtype]
        field.data = b"".join(tensor.data for tensor in tensors)
        field.offsets = np.cumsum([0] + [len(tensor.data) for tensor in tensors]).astype("<i8").tobytes()
        field.trailing_shape.extend(trailing)
    return body


def _topk(topk: messages.TopK) -> pb.TopkLogprobs:
    return pb.TopkLogprobs(token_ids=topk.token_ids, logprobs=topk.logprobs, k=topk.k, length=topk.length)


def _sample(output: messages.SampleOutput) -> pb.SampleResponse:
    body = pb.SampleResponse(prompt_cache_hit_tokens=output.prompt_cache_hit_tokens)
    for sequence in output.sequences:
        added = body.sequences.add(
            stop_reason=pb.STOP_REASON_LENGTH if sequence.stop_reason == "length" else pb.STOP_REASON_STOP,
            tokens=sequence.tokens,
            logprobs=sequence.logprobs,
        )
        if sequence.topk is not None:
            added.topk_sampled_logprobs.CopyFrom(_topk(sequence.topk))
    if output.prompt_logprobs is not None:
        body.prompt_logprobs = output.prompt_logprobs
    if output.topk_prompt_logprobs is not None:
        body.topk_prompt_logprobs.CopyFrom(_topk(output.topk_prompt_logprobs))
    if (cells := output.prompt_targets) is not None:
        target = body.target_prompt_logprobs
        target.dtype = pb.DTYPE_FLOAT32
        target.shape.extend(cells.shape)
        if cells.crow_indices is None or cells.col_indices is None:
            target.dense = cells.values
        else:
            target.sparse_csr.values = cells.values
            target.sparse_csr.crow_indices = cells.crow_indices
            target.sparse_csr.col_indices = cells.col_indices
    if (drawn := output.prompt_alternatives) is not None:
        rows = len(drawn.token_ids) // (4 * drawn.k)
        for tensor, dtype, data in (
            (body.prompt_alt_tokens.tokens, pb.DTYPE_INT32, drawn.token_ids),
            (body.prompt_alt_tokens.logprobs, pb.DTYPE_FLOAT32, drawn.logprobs),
        ):
            tensor.dtype = dtype
            tensor.shape.extend((rows, drawn.k))
            tensor.dense = data
    return body


def as_json(output: messages.Output) -> dict[str, Any]:
    """What the engine said, for `reply` to be laid over. NaN becomes null."""
    if isinstance(output, messages.ForwardBackwardOutput):
        return {
            "loss_fn_output_type": OUTPUT_TYPE,
            "loss_fn_outputs": [
                {
                    "logprobs": {
                        "data": np.frombuffer(tensor.data, _NUMPY[tensor.dtype]).tolist(),
                        "dtype": tensor.dtype,
                        "shape": list(tensor.shape),
                    }
                }
                for tensor in output.logprobs
            ],
            "metrics": output.metrics,
        }
    if isinstance(output, messages.SampleOutput):
        return {
            "type": "sample",
            "sequences": [
                {
                    "stop_reason": sequence.stop_reason,
                    "tokens": np.frombuffer(sequence.tokens, "<i4").tolist(),
                    "logprobs": np.frombuffer(sequence.logprobs, "<f4").tolist(),
                }
                for sequence in output.sequences
            ],
            "prompt_logprobs": None
            if output.prompt_logprobs is None
            else np.frombuffer(output.prompt_logprobs, "<f4").tolist(),
        }
    if isinstance(output, messages.OptimStepOutput):
        return {"metrics": output.metrics}
    if isinstance(output, messages.StateSaved | messages.SamplerSaved):
        return {"size_bytes": output.size_bytes}
    return {}
