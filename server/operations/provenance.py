"""Log-probs that a datum does not bring, but whose sampled sequences it names.

Answers of samples stay in the ledger, so every sequence that was ever sampled can be named; the request's
`record_stability_info` asks for no more than that.
"""

from __future__ import annotations

import asyncio

import numpy as np

from ...engine import messages
from ..errors import BadRequest
from ..wire.forward_backward import Span
from .operations import Operations

LOSSES = frozenset({"stable_reinforce"})  # whose log-probs are looked up


def sequence_id(request_id: str, index: int) -> str:
    """Derived from the request id, so that a resubmission is told the same."""
    return f"{request_id}:{index}"


async def with_sampled_logprobs(
    operations: Operations, owner: str, data: list[messages.Datum], spans: list[list[Span]]
) -> list[messages.Datum]:
    """`data`, and where a datum has no `logprobs`, those of the sequences that its spans name.

    Targets from a prompt have log-prob 0, and must have advantage 0. Raises BadRequest naming datum and span.
    """
    filled = []
    for index, datum in enumerate(data):
        if "logprobs" not in datum.inputs:
            datum = await _filled(operations, owner, index, datum, spans[index])
        filled.append(datum)
        if index % 64 == 63:
            await asyncio.sleep(0)  # what is in memory is found without waiting
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
