"""Answers of operations: what each one changes in the ledger.

An answer decides whether a replay still needs the operation, counts what the operation used, and settles the
checkpoint, sampler or model that the operation was about.
"""

from __future__ import annotations

from sqlalchemy import Connection

from ...engine import messages
from ..ledger import accounts, tenancy
from ..ledger import checkpoints as checkpoint_rows
from ..ledger import payloads as payload_rows
from .operation import Answer, Operation

REPLAYED = frozenset(
    {"forward_backward", "optim_step", "drop_gradients", "load_weights", "save_unnamed_sampler"}
)
"""Operations that change a model: a replay after the newest snapshot needs them again."""
KEPT = frozenset({"create_custom_loss"})
"""Operations whose payloads stay in the ledger: uploaded losses, for later operations."""
_KEPT_WHEN_DONE = REPLAYED | KEPT
SAVES = ("save_weights", "save_weights_for_sampler", "save_weights_external")
"""Operations that save a checkpoint."""


def settle(
    connection: Connection, operation: Operation, answer: Answer, ran: bool, sample: messages.Sample | None
) -> None:
    """Write what follows from an operation's first answer; of a pass or step that was done,
    `ledger.operations.finish_training` writes it.

    `ran`: an engine has begun the operation. `sample` is what a sample asked for.
    """
    _keep_for_replay(connection, operation, answer, ran)
    output = answer.output if isinstance(answer, messages.Done) else None
    if operation.used:
        _add_usage(connection, operation, sample)
    if operation.kind == "save_unnamed_sampler":
        if output is not None:
            tenancy.publish_inflight(connection, operation.reply["sampling_session_id"])
    elif isinstance(output, messages.StateSaved | messages.SamplerSaved):
        saved = checkpoint_rows.settle(connection, operation.request_id, output.size_bytes)
        if saved is not None:
            checkpoint_rows.record(connection, saved, "saved", size_bytes=output.size_bytes)
    elif operation.kind in SAVES:
        checkpoint_rows.settle(connection, operation.request_id, None)
    elif operation.kind == "create_model":
        state = "failed" if output is None else "ready"
        tenancy.settle_creation(connection, operation.model_id, state)
        if output is not None:
            _record_model(connection, operation)


def _keep_for_replay(connection: Connection, operation: Operation, answer: Answer, ran: bool) -> None:
    """Keep only payloads that do to the model again what the operation did."""
    if isinstance(answer, messages.Done):
        is_kept = operation.kind in _KEPT_WHEN_DONE
    elif ran and operation.kind == "forward_backward":
        # The engine counts failures, for the step after them; without data it fails again, and at once.
        failing = messages.ForwardBackward(operation.request_id, operation.model_id, [], "cross_entropy")
        payload_rows.replace(connection, operation.request_id, messages.encode(failing))
        return
    else:  # a step that is not finite drops the gradients
        is_kept = ran and operation.kind == "optim_step" and answer.category == "user"
    if not is_kept:
        payload_rows.drop(connection, operation.request_id)


def _record_model(connection: Connection, operation: Operation) -> None:
    model = tenancy.find_model(connection, operation.model_id)
    assert model is not None
    details = {"model_id": model.id, "session_id": model.session_id, "base_model": model.base_model}
    loaded = {"path": operation.reply["path"]} if "path" in operation.reply else {}
    accounts.audit(connection, model.owner, "model_created", **details, **loaded)


def used(
    operation: Operation, output: messages.Output, sample: messages.Sample | None = None
) -> dict[str, int]:
    """Return what the operation used, by the ledger's counters; `sample` is what a sample asked for.

    Trained are the positions of all datums, once per pass, with a loss or without. A prompt is prefilled
    once for all of its samples.
    """
    match output:
        case messages.ForwardBackwardOutput(logprobs=logprobs):
            return {"trained": sum([tensor.shape[0] for tensor in logprobs])}
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


def _add_usage(connection: Connection, operation: Operation, sample: messages.Sample | None) -> None:
    """Count what the operation used, in the transaction of its answer, so that it is counted once."""
    if sample is None:
        accounts.add_model_usage(connection, operation.model_id, operation.used)
        return
    weights = sample.sampler.weights
    run_id = "" if weights is None else weights.split("/")[1].replace("@", ":")  # of any directory's key
    session_id, base_model = operation.session_id or "", sample.sampler.base_model
    accounts.add_usage(connection, operation.owner, session_id, run_id, base_model, operation.used)
