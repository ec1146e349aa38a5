"""What an answered operation used: tokens trained, prefilled and sampled, checkpoints saved."""

from __future__ import annotations

from sqlalchemy import Connection

from ...engine import messages
from ..ledger import usage as rows
from .operation import Operation


def used(
    operation: Operation, output: messages.Output, sample: messages.Sample | None = None
) -> dict[str, int]:
    """Return what the operation used, by the ledger's counters; `sample` is what a sample asked for.

    Trained are the positions of all datums, once per pass, with a loss or without. A prompt is prefilled
    once for all of its samples.
    """
    match output:
        case messages.ForwardBackwardOutput(logprobs=logprobs):
            return {"trained": sum(tensor.shape[0] for tensor in logprobs)}
        case messages.SampleOutput():
            assert sample is not None
            prompt = len(sample.prompt) // 4  # int32, as the sampled tokens
            cached = min(prompt, output.prompt_cache_hit_tokens)
            return {
                "prefilled": prompt - cached,
                "prefilled_cached": cached,
                "sampled": sum(len(sequence.tokens) // 4 for sequence in output.sequences),
            }
        case messages.StateSaved() | messages.SamplerSaved() if operation.kind != "save_unnamed_sampler":
            return {"checkpoints": 1}
    return {}


def add(
    connection: Connection,
    operation: Operation,
    output: messages.Output,
    sample: messages.Sample | None = None,
) -> None:
    """Counts the answer of an operation, in the transaction that writes it down: never a second time."""
    counts = used(operation, output, sample)
    if counts and sample is None:
        rows.add_of_model(connection, operation.model_id, counts)
    elif counts and sample is not None:
        weights = sample.sampler.weights
        run_id = "" if weights is None else weights.split("/")[1].replace("@", ":")  # of any directory's key
        session_id = operation.session_id or ""
        rows.add(connection, operation.owner, session_id, run_id, sample.sampler.base_model, counts)
