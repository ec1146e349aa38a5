"""Inputs of losses beside the datums: uploaded graphs, and the log-probs of sampled sequences.

The engine checks an uploaded loss, the ledger keeps it, and each operation that names it carries it along.
Answers of samples stay in the ledger too, so a datum may name any sampled sequence instead of sending the
sequence's log-probs; the request's `record_stability_info` needs nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import re

import numpy as np
from sqlalchemy import Connection

from ...engine import messages
from ..access import Quotas
from ..errors import BadRequest, NotFound
from ..ledger import operations as operation_rows
from ..ledger import tenancy
from ..ledger.ledger import Ledger
from ..operations.operation import Operation, Submission
from ..operations.operations import Operations
from ..wire.forward_backward import Span

MAX_LOSSES, MAX_BYTES = 64, 2 << 20  # of a session
_CHECKED_WITHIN = 5.0  # seconds; a check takes milliseconds, but the engine may be compiling, or starting
_LOSS_ID = re.compile(r"([^/]{1,192}):loss:(0|[1-9][0-9]{0,18})")


class CustomLosses:
    """Checks, keeps and finds the losses that clients upload.

    Losses take up bytes of their session, until it ends. With `enabled` False, clients may not have any.
    """

    def __init__(self, ledger: Ledger, operations: Operations, quotas: Quotas, enabled: bool):
        self._ledger = ledger
        self._quotas = quotas
        self._operations = operations
        self._enabled = enabled

    async def create(self, owner: str, session_id: str, seq_id: int, loss: messages.CustomLoss) -> Operation:
        """Accept a loss for one of the owner's sessions. A repeated `seq_id` returns the first loss.

        Raises BadRequest, also for a graph that the engine refuses at once; the operation's answer
        tells of one that it refuses later.
        """
        self._require_enabled()
        limit = self._quotas[owner].metadata_bytes

        def within_limits(connection: Connection, _request_id: str) -> None:
            count, size = operation_rows.stored_custom_losses(connection, session_id)
            if count >= MAX_LOSSES or size + len(loss.graph) > MAX_BYTES:
                raise BadRequest(
                    f"create_custom_loss: the session has {count} losses of {size} bytes; "
                    f"it may have {MAX_LOSSES} of {MAX_BYTES} bytes"
                )
            tenancy.require_room(connection, owner, limit)
            tenancy.charge(connection, session_id, tenancy.size_of(loss.graph))

        operation = await self._operations.accept(
            Submission(
                owner,
                operation_rows.CUSTOM_LOSS,
                operation_rows.custom_loss_key(session_id, seq_id),
                lambda request_id: messages.CheckCustomLoss(request_id, loss),
                {"type": operation_rows.CUSTOM_LOSS, "loss_id": f"{session_id}:loss:{seq_id}"},
                also=within_limits,
                session_id=session_id,
            )
        )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(operation.finished.wait(), _CHECKED_WITHIN)
        if isinstance(operation.answer, messages.Failed) and operation.answer.category == "user":
            raise BadRequest(f"create_custom_loss: {operation.answer.message}")
        return operation

    async def find(self, owner: str, session_id: str, loss_id: str) -> messages.CustomLoss:
        """Return a loss of this session. Raises NotFound for one that is not of this session and owner."""
        self._require_enabled()
        named = _LOSS_ID.fullmatch(loss_id)
        if named is not None and named[1] == session_id:
            key = operation_rows.custom_loss_key(session_id, int(named[2]))
            row = await self._ledger.read(operation_rows.find_custom_loss, key)
            if row is not None and row.owner == owner:
                message = messages.decode_to_engine(row.data)
                assert isinstance(message, messages.CheckCustomLoss)
                return message.loss
        raise NotFound(
            f"unknown custom loss {loss_id[:256]!r}: create it with create_custom_loss in the model's session"
        )

    def _require_enabled(self) -> None:
        if not self._enabled:
            raise BadRequest("this server runs no custom losses; the SDK runs them in the client")


SAMPLED_LOSSES = frozenset({"stable_reinforce"})  # whose log-probs are looked up


def sequence_id(request_id: str, index: int) -> str:
    """Name a sequence of a sample. A resubmission has the same request id, and so the same names."""
    return f"{request_id}:{index}"


async def with_sampled_logprobs(
    operations: Operations, owner: str, data: list[messages.Datum], spans: list[list[Span]]
) -> list[messages.Datum]:
    """Return the datums, each with `logprobs`: its own, or those of the sequences that its spans name.

    Targets from a prompt have log-prob 0, and must have advantage 0. Raises BadRequest naming datum and
    span.
    """
    filled = []
    for index, datum in enumerate(data):
        if "logprobs" not in datum.inputs:
            datum = await _filled(operations, owner, index, datum, spans[index])
        filled.append(datum)
        if index % 64 == 63:
            await asyncio.sleep(0)  # lookups in memory never wait, so nothing else would run
    return filled


async def _filled(
    operations: Operations, owner: str, index: int, datum: messages.Datum, spans: list[Span]
) -> messages.Datum:
    targets = datum.inputs.get("target_tokens")
    if targets is None or targets.dtype != "int64" or len(targets.shape) != 1:
        raise BadRequest(f"datum {index}: loss_fn_inputs['target_tokens']: must be int64 of shape [N]")
    tokens = np.frombuffer(targets.data, "<i8")
    if not spans:
        raise BadRequest(
            f"datum {index}: loss_fn_inputs has no 'logprobs'; send the sampler's, or name the sampled "
            "sequences with Datum.with_provenance"
        )
    if any(span.length < 0 or span.offset < 0 for span in spans):
        raise BadRequest(f"datum {index}: loss_fn_input_spans: a length or an offset is negative")
    if sum(span.length for span in spans) != len(tokens):
        raise BadRequest(
            f"datum {index}: loss_fn_input_spans cover {sum(span.length for span in spans)} positions; "
            f"target_tokens has {len(tokens)}"
        )
    logprobs = np.zeros(len(tokens), "<f4")
    sampled = np.zeros(len(tokens), bool)
    at = 0
    for number, span in enumerate(spans):
        here = slice(at, at := at + span.length)
        if not span.sampled:
            continue
        where = f"datum {index}: loss_fn_input_spans[{number}]"
        if number % 64 == 63:
            await asyncio.sleep(0)
        sequence = await _sequence(operations, owner, span.sequence_id, where)
        there = slice(span.offset, span.offset + span.length)
        if not np.array_equal(np.frombuffer(sequence.tokens, "<i4")[there], tokens[here]):
            raise BadRequest(
                f"{where}: target_tokens [{here.start}, {here.stop}) are not the tokens "
                f"[{there.start}, {there.stop}) sampled as {span.sequence_id!r}"
            )
        logprobs[here] = np.frombuffer(sequence.logprobs, "<f4")[there]
        sampled[here] = True
    advantages = datum.inputs.get("advantages")
    if advantages is not None and advantages.dtype == "float32" and advantages.shape == targets.shape:
        untraced = np.flatnonzero((np.frombuffer(advantages.data, "<f4") != 0) & ~sampled)
        if len(untraced):
            raise BadRequest(
                f"datum {index}: loss_fn_inputs['advantages'] is not 0 at position {untraced[0]}, whose "
                "target was not sampled; only sampled tokens can have an advantage"
            )
    found = messages.Tensor("float32", (len(tokens),), logprobs.tobytes())
    return messages.Datum(datum.tokens, datum.inputs | {"logprobs": found})


async def _sequence(
    operations: Operations, owner: str, identifier: str, where: str
) -> messages.SampledSequence:
    request_id = identifier.rpartition(":")[0]
    operation = await operations.find(owner, request_id)
    answer = operation.answer if operation is not None and operation.kind == "sample" else None
    if isinstance(answer, messages.Done) and isinstance(answer.output, messages.SampleOutput):
        for index, sequence in enumerate(answer.output.sequences):
            if identifier == sequence_id(request_id, index):
                return sequence
    raise BadRequest(f"{where}: unknown sequence {identifier!r}; name one of sample_sequence_ids")
