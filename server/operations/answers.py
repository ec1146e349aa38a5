"""Answers of operations: what each one changes in the ledger, and the newest ones in memory.

An answer decides whether a replay still needs the operation, counts what the operation used, and settles the
checkpoint, sampler or model that the operation was about.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

from sqlalchemy import Connection

from ...engine import messages
from ..ledger import accounts, tenancy
from ..ledger import checkpoints as checkpoint_rows
from ..ledger import payloads as payload_rows
from .operation import Answer, Operation, held_bytes

REPLAYED = frozenset(
    {"forward_backward", "optim_step", "drop_gradients", "load_weights", "save_unnamed_sampler"}
)
"""Operations that change a model: a replay after the newest snapshot needs them again."""
KEPT = frozenset({"create_custom_loss"})
"""Operations whose payloads stay in the ledger: uploaded losses, for later operations."""
_KEPT_WHEN_DONE = REPLAYED | KEPT
SAVES = ("save_weights", "save_weights_for_sampler", "save_weights_external")
"""Operations that save a checkpoint."""
_REMEMBERED_BYTES = 16 << 20
_OPERATION_BYTES = 2048  # its objects, whatever is in them


class RememberedAnswers:
    """The newest answered operations by id, up to so many bytes; older ones are read from the ledger.

    An owner with more than half of the bytes is the first to lose its oldest.
    """

    def __init__(self, max_bytes: int = _REMEMBERED_BYTES):
        self._max_bytes = max_bytes
        self._operations: dict[str, Operation] = {}
        self._sizes: OrderedDict[str, int] = OrderedDict()  # by id, the oldest first
        self._of_owner: dict[str, OrderedDict[str, None]] = {}  # ids, the oldest first
        self._bytes_of_owner: Counter[str] = Counter()
        self._bytes = 0

    def get(self, request_id: str) -> Operation | None:
        return self._operations.get(request_id)

    def forget(self, owner: str) -> None:
        """Forget the owner's operations here; the ledger may still have them."""
        for request_id in list(self._of_owner.get(owner, ())):
            self._remove(request_id)

    def add(self, operation: Operation) -> None:
        request_id, owner = operation.request_id, operation.owner
        if request_id in self._operations:
            self._remove(request_id)
        size = _OPERATION_BYTES + held_bytes(operation.answer) + held_bytes(operation.reply)
        self._operations[request_id] = operation
        self._sizes[request_id] = size
        self._of_owner.setdefault(owner, OrderedDict())[request_id] = None
        self._bytes_of_owner[owner] += size
        self._bytes += size
        while self._bytes > self._max_bytes and len(self._operations) > 1:
            is_greedy = self._bytes_of_owner[owner] > self._max_bytes / 2 and len(self._of_owner[owner]) > 1
            self._remove(next(iter(self._of_owner[owner] if is_greedy else self._sizes)))

    def _remove(self, request_id: str) -> None:
        owner, size = self._operations.pop(request_id).owner, self._sizes.pop(request_id)
        self._bytes -= size
        self._bytes_of_owner[owner] -= size
        del self._of_owner[owner][request_id]
        if not self._of_owner[owner]:
            del self._of_owner[owner], self._bytes_of_owner[owner]


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
