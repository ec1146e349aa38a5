"""What an answered operation used: tokens trained, prefilled and sampled, checkpoints saved."""

from __future__ import annotations

from sqlalchemy import Connection

from ...engine import messages
from ..ledger import usage as rows
from .operation import Operation


def add(
    connection: Connection,
    operation: Operation,
    output: messages.Output,
    sample: messages.Sample | None = None,
) -> None:
    """Counts the answer of an operation, in the transaction that writes it down: never a second time.

    Trained are the positions of all datums, once per pass, with a loss or without. A prompt is prefilled
    once for all of its samples.
    """
    match output:
        case messages.ForwardBackwardOutput(logprobs=logprobs):
            counts = {"trained": sum(tensor.shape[0] for tensor in logprobs)}
            rows.add_of_model(connection, operation.model_id, counts)
        case messages.SampleOutput():
            assert sample is not None
            _add_sample(connection, operation, output, sample)
        case messages.StateSaved() | messages.SamplerSaved() if operation.kind != "save_unnamed_sampler":
            rows.add_of_model(connection, operation.model_id, {"checkpoints": 1})


def _add_sample(
    connection: Connection, operation: Operation, output: messages.SampleOutput, asked: messages.Sample
) -> None:
    prompt = len(asked.prompt) // 4  # int32, as the sampled tokens
    cached = min(prompt, output.prompt_cache_hit_tokens)
    session_id = operation.session_id or ""
    weights = asked.sampler.weights
    counts = {
        "prefilled": prompt - cached,
        "prefilled_cached": cached,
        "sampled": sum(len(sequence.tokens) // 4 for sequence in output.sequences),
    }
    run_id = "" if weights is None else weights.split("/")[1].replace("@", ":")  # of any directory's key
    rows.add(connection, operation.owner, session_id, run_id, asked.sampler.base_model, counts)
