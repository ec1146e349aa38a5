"""Writes the engine's answers as bodies: protobuf for clients that accept it, JSON for all others."""

from __future__ import annotations

import base64
import itertools
import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import orjson

from ...engine import messages
from ..dialect import Dialect
from . import tinsmith_wire_pb2 as pb


def tokens_of(encoded: bytes) -> list[int]:
    return np.frombuffer(encoded, "<i4").tolist()


def logprobs_of(encoded: bytes) -> list[float]:
    return np.frombuffer(encoded, "<f4").tolist()


def prompt_logprobs_of(output: messages.SampleOutput) -> list[float | None]:
    """Return the log-prob of each token of a prompt; the first has none."""
    values: list[float | None] = [*logprobs_of(output.prompt_logprobs or b"")]
    return [None, *values[1:]]


def likely_of(topk: messages.TopK | None) -> list[list[tuple[int, float]]]:
    """Return the most likely tokens and their log-probs in the place of each drawn token."""
    if topk is None:
        return []
    ids = np.frombuffer(topk.token_ids, "<i4").reshape(topk.length, topk.k).tolist()
    values = np.frombuffer(topk.logprobs, "<f4").reshape(topk.length, topk.k).tolist()
    return [
        [pair for pair in zip(*row, strict=True) if pair[1] != messages.EMPTY_LOGPROB]
        for row in zip(ids, values, strict=True)
    ]


PROTOBUF = "application/x-protobuf"
OUTPUT_TYPE = "ArrayRecord"
_DTYPES = {"float32": pb.DTYPE_FLOAT32, "int64": pb.DTYPE_INT64, "int32": pb.DTYPE_INT32}
_NUMPY = {"float32": "<f4", "int64": "<i8", "int32": "<i4"}


def size(outputs: Sequence[messages.Output]) -> int:
    """Return roughly how many bytes of numbers the outputs have."""
    total = 0
    for output in outputs:
        if isinstance(output, messages.ForwardBackwardOutput):
            total += sum(len(each.data) for each in output.logprobs + (output.elementwise_loss or []))
        elif isinstance(output, messages.SampleOutput):
            total += sum(
                len(each.tokens) + len(each.logprobs) + _topk_bytes(each.topk) for each in output.sequences
            )
            total += sum(len(each.experts.data) for each in output.sequences if each.experts is not None)
            total += len(output.prompt_logprobs or b"") + _topk_bytes(output.topk_prompt_logprobs)
            if output.prompt_targets is not None:
                total += len(output.prompt_targets.values)
            if output.prompt_alternatives is not None:
                total += 2 * len(output.prompt_alternatives.token_ids)
    return total


def _topk_bytes(topk: messages.TopK | None) -> int:
    return 0 if topk is None else len(topk.token_ids) + len(topk.logprobs)


def encode(outputs: list[messages.Output]) -> bytes:
    """Encode outputs for `rendered` in another process."""
    return msgspec.msgpack.encode(outputs)


def rendered(
    encoded: bytes, dialect: Dialect, reply: dict[str, Any], texts: list[str] | None, wrapped: bool
) -> bytes:
    """Return the JSON answer to a poll. `reply`: further keys. `texts`: of the sequences. `wrapped`: as a
    poll by path answers, with the result under `result` too, and a `status`."""
    outputs = msgspec.msgpack.decode(encoded, type=list[messages.Output])
    return orjson.dumps(body(outputs, dialect, reply, texts, wrapped))


def body(
    outputs: list[messages.Output],
    dialect: Dialect,
    reply: dict[str, Any],
    texts: list[str] | None,
    wrapped: bool,
) -> dict[str, Any]:
    """Return what `rendered` writes as JSON."""
    found = as_json(joined(outputs), dialect) | reply
    for sequence, text in zip(found.get("sequences", []), texts or [], strict=False):
        sequence["text"] = text
    return found | {"status": "completed", "result": found} if wrapped else found


def as_protobuf(output: messages.Output) -> bytes | None:
    """Serialize an output; return None for outputs that are JSON in every dialect."""
    if isinstance(output, messages.SampleOutput):
        return _sample(output).SerializeToString()
    if not isinstance(output, messages.ForwardBackwardOutput):
        return None
    body = pb.ForwardBackwardOutput(loss_fn_output_type=OUTPUT_TYPE)
    body.metrics.update(output.metrics)
    # One record per run of datums that agree in dtype and trailing shape.
    for (dtype, trailing), group in itertools.groupby(
        output.logprobs, key=lambda tensor: (tensor.dtype, tensor.shape[1:])
    ):
        pieces = [tensor.data for tensor in group]
        record = body.loss_fn_outputs.add(type_tag=OUTPUT_TYPE, num_datums=len(pieces))
        field = record.fields["logprobs"]
        field.dtype = _DTYPES[dtype]
        field.data = b"".join(pieces)
        offsets = itertools.accumulate(map(len, pieces), initial=0)
        field.offsets = struct.pack(f"<{len(pieces) + 1}q", *offsets)
        field.trailing_shape.extend(trailing)
    return body.SerializeToString()


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


def joined(outputs: list[messages.Output]) -> messages.Output:
    """Join the samples of several prompts into one output; return any other output as it is."""
    if len(outputs) == 1:
        return outputs[0]
    samples = [output for output in outputs if isinstance(output, messages.SampleOutput)]
    hits = sum(output.prompt_cache_hit_tokens for output in samples)
    return messages.SampleOutput(
        [sequence for output in samples for sequence in output.sequences], prompt_cache_hit_tokens=hits
    )


# By another name, in the answers of servers that are not Tinker's.
_OTHER_METRICS = {"loss:sum": "total_loss:sum", "tokens:sum": "num_tokens:sum"}
# tinkercloud's page has these without a reduction.
_BARE_METRICS = ("ppo_kl", "pg_clipfrac")


def _metrics(metrics: dict[str, float], dialect: Dialect) -> dict[str, float]:
    """Return the engine's metrics, and those that clients of other servers look for."""
    if dialect == "tinker":
        return metrics
    metrics = metrics | {
        new: metrics[name] for name, new in _OTHER_METRICS.items() if name in metrics and new not in metrics
    }
    if metrics.get("valid_tokens:sum"):
        metrics.setdefault("loss:mean", metrics["loss:sum"] / metrics["valid_tokens:sum"])
    if dialect == "tinkercloud":
        bare = {key.partition(":")[0]: value for key, value in metrics.items()}
        if "kl_sampled" in bare:  # a policy loss
            bare.setdefault("ppo_kl", bare["kl_sampled"] / max(1.0, metrics.get("valid_tokens:sum", 0.0)))
            bare.setdefault("pg_clipfrac", bare.get("clip_fraction", 0.0))
        metrics |= {name: bare[name] for name in _BARE_METRICS if name in bare}
    return metrics


def as_json(output: messages.Output, dialect: Dialect = "tinker") -> dict[str, Any]:
    """Return an output as JSON's values, before `reply` is added. NaN becomes null."""
    if isinstance(output, messages.ForwardBackwardOutput):
        return {
            "loss_fn_output_type": OUTPUT_TYPE,
            "info": {},
            "loss_fn_outputs": _loss_fn_outputs(output),
            "metrics": _metrics(output.metrics, dialect),
        }
    if isinstance(output, messages.SampleOutput):
        return _sample_as_json(output)
    if isinstance(output, messages.OptimStepOutput):
        return _step_as_json(output.metrics)
    if isinstance(output, messages.StateSaved | messages.SamplerSaved):
        return {"size_bytes": output.size_bytes}
    return {}


def _loss_fn_outputs(output: messages.ForwardBackwardOutput) -> list[dict[str, Any]]:
    """Return each datum's log-probs, and, if they are asked for, xorl's losses by target and tinkercloud's by
    datum."""
    found: list[dict[str, Any]] = [{"logprobs": _dense(tensor)} for tensor in output.logprobs]
    for of_datum, tensor in zip(found, output.elementwise_loss or [], strict=False):
        of_datum["elementwise_loss"] = _dense(tensor)
        total = float(np.frombuffer(tensor.data, "<f4").sum(dtype=np.float64))
        of_datum["loss"] = {"data": [total], "dtype": "float32", "shape": [1]}
    return found


def _dense(tensor: messages.Tensor) -> dict[str, Any]:
    data = np.frombuffer(tensor.data, _NUMPY[tensor.dtype]).tolist()
    return {"data": data, "dtype": tensor.dtype, "shape": list(tensor.shape)}


def _step_as_json(metrics: dict[str, float]) -> dict[str, Any]:
    plain = {key.partition(":")[0]: value for key, value in metrics.items()}
    return {
        "metrics": metrics,
        "grad_norm": plain.get("grad_norm"),
        "step_count": None if (step := plain.get("optimizer_step")) is None else int(step),
    }


def _sample_as_json(output: messages.SampleOutput) -> dict[str, Any]:
    """Return samples with the protobuf's names. Values that were not asked for are null, or left out of a
    sequence. Top-k tables have pairs [token, log-prob] by position, null if there are none, as in SDKs before
    they read protobuf."""
    cells, drawn = output.prompt_targets, output.prompt_alternatives
    return {
        "type": "sample",
        "sequences": [
            {
                "stop_reason": sequence.stop_reason,
                "finish_reason": sequence.stop_reason,
                "tokens": np.frombuffer(sequence.tokens, "<i4").tolist(),
                "logprobs": np.frombuffer(sequence.logprobs, "<f4").tolist(),
            }
            | ({} if sequence.topk is None else {"topk_sampled_logprobs": _topk_as_json(sequence.topk)})
            | ({} if sequence.experts is None else {"routed_experts": _experts_as_json(sequence.experts)})
            for sequence in output.sequences
        ],
        "prompt_logprobs": None
        if output.prompt_logprobs is None
        else np.frombuffer(output.prompt_logprobs, "<f4").tolist(),
        "topk_prompt_logprobs": None
        if output.topk_prompt_logprobs is None
        else _topk_as_json(output.topk_prompt_logprobs),
        "target_prompt_logprobs": None if cells is None else _cells_as_json(cells),
        "prompt_alt_tokens": None
        if drawn is None
        else {
            "tokens": _tensor_as_json(drawn.token_ids, "<i4", "int64", drawn.k),
            "logprobs": _tensor_as_json(drawn.logprobs, "<f4", "float32", drawn.k),
        },
        "prompt_cache_hit_tokens": output.prompt_cache_hit_tokens,
    }


def _experts_as_json(experts: messages.RoutedExperts) -> dict[str, Any]:
    """Little-endian integers [tokens, layers, experts of a token], in base64."""
    data = base64.b64encode(experts.data).decode()
    return {"data": data, "dtype": experts.dtype, "shape": list(experts.shape)}


def _topk_as_json(topk: messages.TopK) -> list[list[tuple[int, float]] | None]:
    tokens = np.frombuffer(topk.token_ids, "<i4").reshape(topk.length, topk.k)
    logprobs = np.frombuffer(topk.logprobs, "<f4").reshape(topk.length, topk.k)
    filled = (tokens != 0) | (logprobs != messages.EMPTY_LOGPROB)
    return [
        list(zip(row[keep].tolist(), values[keep].tolist(), strict=True)) or None
        for row, values, keep in zip(tokens, logprobs, filled, strict=True)
    ]


def _cells_as_json(cells: messages.PromptCells) -> dict[str, Any]:
    body = {"data": np.frombuffer(cells.values, "<f4").tolist(), "dtype": "float32", "shape": cells.shape}
    if cells.crow_indices is not None and cells.col_indices is not None:
        body["sparse_crow_indices"] = np.frombuffer(cells.crow_indices, "<i8").tolist()
        body["sparse_col_indices"] = np.frombuffer(cells.col_indices, "<i8").tolist()
    return body


def _tensor_as_json(data: bytes, stored: str, dtype: str, columns: int) -> dict[str, Any]:
    """Return a dense tensor with this many columns. `stored`: the numpy type of the bytes."""
    values = np.frombuffer(data, stored)
    return {"data": values.tolist(), "dtype": dtype, "shape": (len(values) // columns, columns)}
