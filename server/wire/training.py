"""Bodies of training operations: their types, and how they become the engine's messages.

Of a damaged body, `model_id` and `seq_id` are read if possible, so that its number counts as used.

JSON of forward_backward becomes the protobuf message that SDKs send, so that both are checked by the same
code.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import orjson
import zstandard
from pydantic import (
    AliasChoices,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    ValidationError,
    model_validator,
)

from ...engine import messages
from ..errors import ApiError, BadRequest, Invalid
from . import Body, Finite, Int64, Sequenced, describe, example, find_long_number, numbered, over_float64
from . import forward_backward as protobuf
from . import tinsmith_wire_pb2 as pb
from .forward_backward import ForwardBackwardBody, checked, decompress
from .sample_requests import ModelInput

PER_TOKEN = "return_per_token"
"""The key, in any loss's config, that asks for each token's loss. The server reads it, not the engine."""
_POLICY = (
    *("eps_clip", "eps_clip_high", "eps_clip_c", "icepop_beta", "use_tis", "tis_clip_low", "tis_clip_high"),
    "compute_kl_stats",
)
_THRESHOLDS = ("clip_low_threshold", "clip_high_threshold")
CONFIG_KEYS: dict[str, tuple[str, ...]] = {
    "cross_entropy": (),
    "importance_sampling": ("compute_kl_stats",),
    "ppo": _THRESHOLDS,
    "cispo": (*_THRESHOLDS, "compute_kl_stats"),
    "dro": ("beta",),
    "stable_reinforce": (*("mask_low_threshold", "mask_high_threshold", "truncation_threshold"), "kl_coeff"),
    "gspo": _THRESHOLDS,
    "causallm_loss": (PER_TOKEN,),
    "policy_loss": _POLICY,
    "ppo_loss": _POLICY,
    "drgrpo": ("clip_low", "clip_high", "beta", "kl_type", "ratio_type"),
}
CUSTOM = "custom"  # a loss that a client has traced


def check_loss(name: str, config: Iterable[str]) -> None:
    """Raise BadRequest for an unknown loss or key of its config, naming the known ones."""
    if name == CUSTOM:
        return
    if name not in CONFIG_KEYS:
        raise BadRequest(f"loss_fn: unknown loss {name[:64]!r}; this server has {', '.join(CONFIG_KEYS)}")
    keys = CONFIG_KEYS[name]
    for key in config:
        if key not in (*keys, PER_TOKEN):
            takes = ", ".join(keys) or "none"
            raise BadRequest(f"loss_fn_config: unknown key {key[:64]!r} for loss {name!r}; it takes: {takes}")


Number = Int64 | float
_CODES = {
    "float32": (pb.DTYPE_FLOAT32, "<f4"),
    "int64": (pb.DTYPE_INT64, "<i8"),
    "int32": (pb.DTYPE_INT32, "<i4"),
}
# By name, where a list says no dtype.
_INTEGERS = frozenset({"target_tokens", "labels", "target"})


class TensorData(Body):
    """A tensor: row-major, or, with both kinds of indices, in compressed sparse rows. Without a shape it is a
    vector; without a dtype it is int64 for targets, float32 for all else."""

    data: list[Number]
    dtype: Literal["float32", "int64", "int32"] | None = None
    shape: Annotated[list[Int64], Field(max_length=2)] | None = None
    sparse_crow_indices: list[Int64] | None = None
    sparse_col_indices: list[Int64] | None = None


class Datum(Body):
    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData | list[Number]]


class Batch(Body):
    data: list[Datum]
    loss_fn: str = "cross_entropy"
    loss_fn_config: dict[str, StrictBool | float | str | None] | None = Field(
        None, validation_alias=AliasChoices("loss_fn_config", "loss_fn_params")
    )
    routed_experts: Any = None
    routed_expert_logits: Any = None


class ForwardBackward(Sequenced):
    """A batch to train on, in `forward_backward_input` or `forward_input`, or in the body itself."""

    model_config = ConfigDict(
        json_schema_extra=example(
            model_id="model-abc-123",
            data=[
                {
                    "model_input": {"chunks": [{"tokens": [1, 2, 3, 4, 5, 6, 7, 8]}]},
                    "loss_fn_inputs": {
                        "target_tokens": {"data": [5, 6, 7, 8], "dtype": "int64"},
                        "logprobs": {"data": [-2.1, -1.8, -3.2, -2.5], "dtype": "float32"},
                        "advantages": {"data": [0.5, -0.3, 0.8, 0.2], "dtype": "float32"},
                    },
                }
            ],
            loss_fn="importance_sampling",
        )
    )
    forward_backward_input: Batch | None = Field(
        None, validation_alias=AliasChoices("forward_backward_input", "forward_input")
    )
    data: list[Datum] | None = None
    loss_fn: str = "cross_entropy"
    loss_fn_config: dict[str, StrictBool | float | str | None] | None = Field(
        None, validation_alias=AliasChoices("loss_fn_config", "loss_fn_params")
    )

    @property
    def batch(self) -> Batch:
        """The batch, wherever the body has it. Raises BadRequest."""
        if (self.forward_backward_input is None) == (self.data is None):
            raise BadRequest("forward_backward_input, forward_input or data: send one of them")
        if self.forward_backward_input is not None:
            return self.forward_backward_input
        return Batch(data=self.data or [], loss_fn=self.loss_fn, loss_fn_config=self.loss_fn_config)


def peek(raw: bytes) -> tuple[Any, Any]:
    """Return model_id and seq_id of a JSON body, whatever else is in it. Raises BadRequest for other
    bodies."""
    try:
        content = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if (long := find_long_number(raw, over_float64)) is not None:
            raise Invalid(describe([{"loc": long.location, "type": "", "msg": long.message}])) from None
        raise BadRequest(f"the body is neither JSON nor a protobuf ForwardBackwardRequest: {error}") from None
    if not isinstance(content, dict):
        raise BadRequest("the body is not a JSON object")
    return numbered(content)


def decode(raw: bytes, max_datums: int) -> ForwardBackwardBody:
    """Decode a JSON body of forward or forward_backward.

    Raises Invalid, or BadRequest naming datum and field.
    """
    try:
        body = ForwardBackward.model_validate_json(raw)
    except ValidationError as error:
        raise Invalid(describe([*map(dict, error.errors())])) from None
    return checked(_message(body), max_datums)


def _message(body: ForwardBackward) -> pb.ForwardBackwardRequest:
    batch = body.batch
    for name in ("routed_experts", "routed_expert_logits"):
        if getattr(batch, name) is not None:
            raise BadRequest(f"{name}: this server's models choose their experts themselves; leave it out")
    check_loss(batch.loss_fn, batch.loss_fn_config or {})
    request = pb.ForwardBackwardRequest(
        model_id=body.model_id, seq_id=body.seq_id or 0, loss_fn=batch.loss_fn
    )
    for index, datum in enumerate(batch.data):
        tokens = _array(datum.model_input.ids(f"datum {index}: model_input"), "<i4", f"datum {index}: tokens")
        added = request.data.add()
        added.model_input.add(encoded_text=pb.EncodedTextChunk(tokens=tokens))
        for name, given in datum.loss_fn_inputs.items():
            where = f"datum {index}: loss_fn_inputs[{name!r}]"
            added.loss_fn_inputs[name].CopyFrom(_tensor(name, given, where))
    for key, value in (batch.loss_fn_config or {}).items():
        if isinstance(value, str):
            request.loss_fn_config_v2[key].text = value
        elif value is not None:
            request.loss_fn_config_v2[key].number = float(value)
    return request


def _tensor(name: str, given: TensorData | list[Number], where: str) -> pb.Tensor:
    tensor = given if isinstance(given, TensorData) else TensorData(data=given)
    code, stored = _CODES[tensor.dtype or ("int64" if name in _INTEGERS else "float32")]
    data = _array(tensor.data, stored, where)
    crow, cols = tensor.sparse_crow_indices, tensor.sparse_col_indices
    if (crow is None) != (cols is None):
        raise BadRequest(f"{where}: sparse_crow_indices and sparse_col_indices come together")
    if crow is None or cols is None:
        return pb.Tensor(dtype=code, shape=tensor.shape or [], dense=data)
    sparse = pb.SparseCsr(
        values=data, crow_indices=_array(crow, "<i8", where), col_indices=_array(cols, "<i8", where)
    )
    return pb.Tensor(dtype=code, shape=tensor.shape or [], sparse_csr=sparse)


def _array(values: list[Any] | np.ndarray, stored: str, where: str) -> bytes:
    """Return numbers as the dtype's bytes. Raises BadRequest for numbers that the dtype does not have."""
    try:
        array = np.asarray(values, np.float64 if stored == "<f4" else None)
        if stored != "<f4" and array.size and array.dtype.kind != "i":
            if any(value != int(value) for value in values):
                raise BadRequest(f"{where}: fractions in a tensor of integers")
            array = np.asarray([int(value) for value in values])
        bits = {"<i4": 32, "<i8": 64}.get(stored)
        if (
            bits
            and array.size
            and not -(1 << bits - 1) <= int(array.min()) <= int(array.max()) < 1 << bits - 1
        ):
            raise BadRequest(f"{where}: numbers outside the {bits} bits of an int{bits}")
        with np.errstate(over="ignore"):
            return array.astype(stored).tobytes()
    except (OverflowError, ValueError):
        raise BadRequest(f"{where}: not numbers of the tensor's dtype") from None


class AdamParams(Body):
    """Parameters of a step of AdamW. Those that are left out are as in the model's optimizer_config."""

    learning_rate: Finite = Field(1e-4, ge=0)
    beta1: Finite = Field(0.9, ge=0, lt=1)
    beta2: Finite = Field(0.95, ge=0, lt=1)
    eps: Finite = Field(1e-12, ge=0)
    weight_decay: Finite = Field(0.0, ge=0)
    grad_clip_norm: Finite = Field(0.0, ge=0)


class DimuonParams(Body):
    model_config = ConfigDict(extra="forbid")
    type: Literal["dimuon"]
    learning_rate: Finite = Field(ge=0)
    beta1: Finite = Field(0.9, ge=0, lt=1)
    grad_clip_norm: Finite = 0.0  # below 0: off

    def message(self) -> messages.DimuonParams:
        return messages.DimuonParams(**self.model_dump(exclude={"type"}))


class OptimStep(Sequenced):
    """The body of optim_step. `learning_rate` and `gradient_clip` (0 or less: off) take precedence over those
    of `adam_params`."""

    model_config = ConfigDict(
        json_schema_extra=example(
            model_id="model-abc-123",
            adam_params={
                "learning_rate": 1e-06,
                "beta1": 0.9,
                "beta2": 0.95,
                "eps": 1e-08,
                "weight_decay": 0.01,
            },
        )
    )
    adam_params: AdamParams | None = None
    optimizer_params: dict[str, Any] | None = None
    learning_rate: Finite | None = Field(None, ge=0, validation_alias=AliasChoices("learning_rate", "lr"))
    gradient_clip: Finite | None = None
    step_num: Int64 | None = Field(None, description="the client's own count; given back")

    _params: AdamParams | DimuonParams = PrivateAttr(default_factory=AdamParams)

    @model_validator(mode="after")
    def _either(self) -> OptimStep:
        families: dict[str, type[AdamParams | DimuonParams]] = {"dimuon": DimuonParams}
        family = families.get(self.family, AdamParams)
        if self.adam_params is not None:
            self._params = self.adam_params
        elif self.optimizer_params:
            try:
                self._params = family.model_validate(self.optimizer_params)
            except ValidationError as error:
                raise ValueError(f"optimizer_params: {describe([*map(dict, error.errors())])}") from None
        return self

    @property
    def family(self) -> str:
        """The optimizer that these parameters are for, perhaps an unknown one. Empty: any."""
        if self.adam_params is not None or not self.optimizer_params:
            return ""
        return str(self.optimizer_params.get("type", ""))[:64]

    def message(self, run_id: str, defaults: dict[str, float] | None = None) -> messages.OptimStep:
        """Return the engine's message for this step of a model, without a request id.

        `defaults`: the model's own values of parameters that the body leaves out.
        """
        if isinstance(self._params, DimuonParams):
            return messages.OptimStep("", run_id, dimuon=self._params.message())
        fields = AdamParams().model_dump() | (defaults or {}) | self._params.model_dump(exclude_unset=True)
        if self.learning_rate is not None:
            fields["learning_rate"] = self.learning_rate
        if self.gradient_clip is not None:
            fields["grad_clip_norm"] = max(0.0, self.gradient_clip)
        return messages.OptimStep("", run_id, messages.AdamParams(**fields))


PROTOBUF = "application/x-protobuf"
_DATUMS_AT_ONCE = 512
_datums = msgspec.msgpack.Decoder(list[messages.Datum])


@dataclass(frozen=True)
class ReadBody:
    """A body that a worker has read, or its `error`; `model_id` and `seq_id` may be known even then. The
    datums are encoded in pieces of some hundreds, so that decoding can let others run in between."""

    model_id: Any
    seq_id: Any
    error: ApiError | None = None
    body: ForwardBackwardBody | None = None
    pieces: tuple[bytes, ...] = ()


def read(raw: bytes, content_type: str, encoding: str, max_bytes: int, max_datums: int) -> ReadBody:
    model_id, seq_id = None, None
    is_protobuf = content_type.partition(";")[0].strip() == PROTOBUF
    number_in = protobuf.peek if is_protobuf else peek
    body_of = protobuf.decode if is_protobuf else decode
    try:
        raw = decompress(raw, encoding, max_bytes)
        model_id, seq_id = number_in(raw)
        body = body_of(raw, max_datums)
    except ApiError as error:
        return ReadBody(model_id, seq_id, error)
    if is_protobuf:
        seq_id = body.seq_id
    pieces = tuple(
        msgspec.msgpack.encode(body.data[at : at + _DATUMS_AT_ONCE])
        for at in range(0, len(body.data), _DATUMS_AT_ONCE)
    )
    return ReadBody(body.model_id, seq_id, None, replace(body, data=[]), pieces)


async def with_datums(read: ReadBody) -> ForwardBackwardBody:
    """Return the whole body with its datums decoded. Other tasks can run between the pieces.

    `read` must not have an error.
    """
    assert read.body is not None
    data: list[messages.Datum] = []
    for piece in read.pieces:
        data += _datums.decode(piece)
        await asyncio.sleep(0)
    return replace(read.body, data=data)


COMPRESSED_HEAD_BYTES = 132 << 10  # a whole block of zstd
_PLAIN_BYTES = 1 << 20
_WINDOW_BYTES = 1 << 27
_MEMBER_BYTES = 512
_MOST_MEMBERS = 50_000  # of these names, at any depth: what is behind them is not looked at
_MEMBER = re.compile(
    rb'"(model_id|session_id|seq_id)"\s*+:\s*+("(?:[^"\\]++|\\.){0,400}+"|-?\d{1,20}+)(?=\s*+[,}])', re.DOTALL
)
_NOT_STRUCTURE = bytes(sorted(set(range(256)) - set(b'"{}[]')))


class JsonNumber:
    """Finds `model_id` and `seq_id` among the members of a JSON object that comes in pieces.

    Strings and nesting are followed through the pieces, without parsing values: a few milliseconds for each
    megabyte. The object may be cut off, or wrong elsewhere.
    """

    def __init__(self) -> None:
        self._members: dict[str, Any] = {}
        self._seen = 0
        self._depth = 0
        self._in_string = False
        self._rest = b""

    def feed(self, piece: bytes) -> None:
        """Take in the next piece."""
        if self._seen > _MOST_MEMBERS:
            return
        text = self._rest + piece
        end = max(0, len(text) - _MEMBER_BYTES)
        while end and text[end - 1] == ord("\\"):  # an escape stays whole
            end -= 1
        self._scan(text, end)

    def found(self, is_complete: bool) -> tuple[Any, Any]:
        """Return model_id and seq_id, or None if unknown. `is_complete`: there are no more pieces."""
        self._scan(self._rest, len(self._rest))
        if is_complete:
            return numbered(self._members)
        return self._members.get("model_id", self._members.get("session_id")), self._members.get("seq_id")

    def _scan(self, text: bytes, end: int) -> None:
        """Take the members that begin before `end`, and keep what is behind it for the next piece."""
        at = 0
        for match in _MEMBER.finditer(text) if b'_id"' in text else ():
            if match.start() >= end:
                break
            self._seen += 1
            self._pass(text[at : match.start()])
            at = match.start()
            if self._depth == 1 and not self._in_string:
                try:
                    self._members[match[1].decode()] = json.loads(match[2])
                except ValueError:  # not UTF-8
                    continue
        self._pass(text[at:end])
        self._rest = text[end:]

    def _pass(self, part: bytes) -> None:
        """Follow strings and nesting through a part of the text."""
        if b"\\" in part:
            part = part.replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = part.translate(None, _NOT_STRUCTURE).split(b'"')
        outside = b"".join(parts[self._in_string :: 2])
        self._in_string ^= len(parts) % 2 == 0
        self._depth += outside.count(b"{") + outside.count(b"[")
        self._depth -= outside.count(b"}") + outside.count(b"]")


def peek_head(head: bytes, encoding: str) -> tuple[Any, Any]:
    """Return model_id and seq_id of a body from its first `COMPRESSED_HEAD_BYTES`. For protobuf, whose first
    fields they are, and for compressed bodies."""
    plain = _decompressed(head, encoding)
    if not is_json(plain):
        return protobuf.peek(plain)
    number = JsonNumber()
    number.feed(plain)
    return number.found(is_complete=False)


def is_json(head: bytes) -> bool:
    """Return whether a body that starts like this can be a JSON object."""
    return head.lstrip()[:1] == b"{"


def _decompressed(head: bytes, encoding: str) -> bytes:
    """Return the beginning of the decompressed body."""
    try:
        if encoding == "zstd":
            decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
            return decompressor.stream_reader(io.BytesIO(head)).read(_PLAIN_BYTES)
        if encoding in ("gzip", "deflate"):
            return zlib.decompressobj(32 + zlib.MAX_WBITS).decompress(head, _PLAIN_BYTES)
    except (zstandard.ZstdError, zlib.error, MemoryError):
        return b""
    return head
