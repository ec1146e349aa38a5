"""The OpenAPI document: FastAPI's own, completed by what FastAPI does not see in the routes.

FastAPI does not see bodies that a route reads by itself (those of forward_backward are JSON or protobuf),
keys, and the error body that all routes share.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema
from typing_extensions import is_typeddict

from ..wire import openai, responses, sample_requests
from ..wire.training import ForwardBackward

DESCRIPTION = """Trains language models and samples what it trains. Three kinds of clients are served on the
same routes: the Tinker SDK, and the REST APIs of tinkercloud and of xorl; requests may have the shape of any
of them, and answers have the fields of all. `X-API-Dialect` (`tinker`, `tinkercloud`, `xorl`) says whose a
request is where that matters. What takes long is answered with a `request_id`, and polled with
retrieve_future."""

_REF = "#/components/schemas/{model}"
BINARY = {"type": "string", "format": "binary"}
"""The schema of a body that is not text."""

_OPENAI_ERROR = {
    "type": "object",
    "title": "OpenAI error",
    "required": ["message", "type", "param", "code"],
    "properties": {
        "message": {"type": "string", "description": "what was wrong, where, and what would be right"},
        "type": {"type": "string"},
        "param": {"type": ["string", "null"], "description": "the field that is wrong"},
        "code": {"type": ["string", "null"]},
    },
}
_ERROR = {
    "type": "object",
    "title": "Error",
    "required": ["detail", "error", "category", "status_code", "path"],
    "properties": {
        "detail": {"type": "string", "description": "what was wrong, where, and what would be right"},
        "error": {
            "description": "the same, under /v1 in OpenAI's shape",
            "anyOf": [{"type": "string"}, _OPENAI_ERROR],
        },
        "category": {"enum": ["user", "server"]},
        "status_code": {"type": "integer"},
        "path": {"type": "string"},
    },
}
# Answered without a key: probes of load balancers have none.
OPEN_PATHS = frozenset({"/health", "/api/v1/health", "/api/v1/healthz", "/healthz"})
_POLLS = ("/api/v1/retrieve_future", "/api/v1/retrieve_future/{request_id}")
_STATUSES = {
    "400": "the request is wrong; `detail` names the field",
    "401": "the key is missing or wrong",
    "403": "the key does not allow it, or a quota is used up",
    "404": "there is no such thing, or it belongs to another tenant",
    "410": "it has been deleted or has expired",
    "413": "the body is too large",
    "415": "the body's Content-Encoding is not supported",
    "422": "the body does not have the form that the route takes",
    "429": "too many requests; try again after Retry-After",
    "503": "not available now; try again after Retry-After",
    "507": "there is no room on the disk, or within the quota of bytes",
}
_FIELDS = {
    "access_scope": "`owned`: the caller's; `accessible`: those with published checkpoints too",
    "adam_params": "the parameters of AdamW; left out: the model's own",
    "add_generation_prompt": "end the prompt with the beginning of an answer",
    "age_encryption_recipients": "encrypt each file to these recipients (age1... or SSH keys)",
    "allow_metadata_only": "answer with the size of a large result instead of the result",
    "alpha": "adapters are scaled by alpha / rank; left out: the server's `--lora-alpha`",
    "base_model": "the name of a base model of this server",
    "best_of": "draw so many and return the `n` likeliest",
    "beta1": "the decay of the first moment",
    "beta2": "the decay of the second moment",
    "betas": "beta1 and beta2",
    "chat_template_kwargs": "variables for the chat template",
    "checkpoint_id": "segment/name",
    "chunks": "pieces, one after the other",
    "content": "the text of the message",
    "continue_final_message": "the model continues the last message",
    "cursor": "where the previous page, or poll, ended",
    "day": "a day of UTC, as 2026-01-31",
    "days": "how many days back",
    "destination_project_id": "the project of the copy",
    "display_name": "a name for people",
    "dropout": "only 0: adapters have no dropout",
    "dtype": "the type of the numbers",
    "echo": "repeat the prompt before each sample",
    "ending_before": "an hour of UTC, which is left out",
    "eps": "added to the root of the second moment",
    "event_type": "only entries of this kind",
    "flush_cache": "without effect: the prefix cache is always flushed",
    "forward_backward_input": "the batch",
    "frequency_penalty": "subtracted from a token's logit for each time that it was drawn",
    "grad_clip_norm": "clip the gradient to this global norm; 0: do not clip",
    "grad_normalization": "`sum` of gradients over tokens, or `token_mean`; left out: the dialect's",
    "gradient_clip": "clip the gradient to this global norm; 0 or less: do not clip",
    "head_config": "not supported",
    "ignore_eos": "do not stop at the model's end tokens",
    "info_message": "a message for people",
    "initial_difficulty": "the level at which environments begin",
    "input_ids": "token ids",
    "kind": "`inflight`: a sampler that moves to newer weights with every such save",
    "learning_rate": "the learning rate",
    "limit": "how many, at most",
    "logprob_start_len": "the first position of the prompt whose log-prob is returned; -1: none",
    "lora_config": "the adapter to train; left out: full weights, or the dialect's default",
    "lora_name": "the name under which SGLang's clients sample these weights",
    "lora_path": "another name for `model`",
    "loss_fn": "the name of the loss",
    "loss_fn_config": "the loss's thresholds and options",
    "loss_fn_inputs": "the tensors that the loss reads, by name, one value per token",
    "max_age_hours": "forget answers that are older",
    "max_completion_tokens": "another name for `max_tokens`",
    "max_new_tokens": "the most tokens to draw; 0: only score the prompt; null: up to the context",
    "max_tokens": "the most tokens to draw",
    "merged": "write the base model with the adapter merged into it",
    "messages": "the conversation so far",
    "min_p": "leave out tokens less likely than this share of the likeliest one",
    "model": "a base model, a sampling session, or a path of sampler weights",
    "model_id": "the model's id, from `create_model`, or the name that the client gave it",
    "model_input": "the tokens",
    "model_path": "the path of a checkpoint",
    "model_seq_id": "the number of the model in its session",
    "n": "how many samples",
    "n_samples_per_prompt": "samples of each prompt",
    "no_stop_trim": "leave the stop string at the end of the text",
    "num_labels": "not supported",
    "num_samples": "how many samples",
    "objective": "only `language_modeling` is supported",
    "offset": "how many to leave out at the beginning",
    "optimizer": "restore the optimizer's moments too",
    "optimizer_config": "the model's optimizer; left out: AdamW",
    "optimizer_dtype": "moments are always float32",
    "optimizer_kwargs": "options of this optimizer",
    "optimizer_params": "the parameters of the model's optimizer, with its `type`",
    "overwrite": "replace a checkpoint of this name",
    "parallelism_config": "without effect: meshes are chosen at the server's start",
    "pause_mode": "`abort`: draw running samples again; others wait for them",
    "pools": "the pools whose servers get the weights",
    "presence_penalty": "subtracted from the logit of each token that was drawn",
    "prompt": "what the sample continues",
    "prompt_alt_tokens_k": "so many other tokens at each position of the prompt, with log-probs",
    "prompt_logprobs": "the log-prob of each token of the prompt; the first has none",
    "prompt_logprobs_last_n": "scores of the prompt's last positions only",
    "prompts": "several prompts, as token ids",
    "rank": "the rank of the adapter; 0: full weights",
    "record_routing": "return the experts that each token got",
    "repetition_penalty": "divides positive logits of tokens that occurred before; multiplies negative ones",
    "request_id": "the id under which the result is polled",
    "reset_weights": "create the model anew at once",
    "return_logprob": "return log-probs of the sample",
    "reward_key": "what is trained on: the environment's `reward`, or `accuracy`",
    "rid": "the request's id, for the answer",
    "rlve_config": "training that the server does itself",
    "role": "who says it: `system`, `user`, `assistant`, ...",
    "rollout_max_response_len": "the most tokens of an answer",
    "rollout_temperature": "the temperature of the answers",
    "run_id": "the id of a training run, which is its model's",
    "sample_sequence_ids": "the ids of the sequences",
    "sampling_engine": "who draws the samples: `embedded`, `sglang` or `auto`",
    "sampling_params": "temperature, stops and so on",
    "sampling_session_id": "the id of a sampling session",
    "sampling_session_seq_id": "the number of the sampling session in its session",
    "save": "in a signed URL: the save that it was made for",
    "save_checkpoint": "save the training state first",
    "sdk_version": "the version of the client",
    "seed": "the seed of the random numbers",
    "segment": "`weights` or `sampler_weights`",
    "seq_id": "the number of the operation; operations of a model run in this order",
    "session_id": "the id of a session, from `create_session`",
    "shape": "the sizes of the dimensions",
    "size_bytes": "bytes on the disk",
    "skip_special_tokens": "leave special tokens out of the text",
    "source_path": "the checkpoint to copy",
    "sparse_col_indices": "columns of the values, in compressed sparse rows",
    "sparse_crow_indices": "where each row's values begin, in compressed sparse rows",
    "starting_on": "an hour of UTC",
    "step": "the number of the optimizer step",
    "stop": "texts (or token ids) at which a sample ends",
    "stop_token_ids": "token ids at which a sample ends",
    "stream": "send tokens as they are drawn",
    "tags": "words by which sessions can be found",
    "target_alignment": "how targets belong to positions: `shifted` or `by_shape`; left out: the dialect's",
    "target_prompt_logprobs": "the log-probs of these tokens at each position of the prompt",
    "temperature": "divides the logits; 0: the likeliest token",
    "tinker_path": "the path of a checkpoint, tinker://RUN/SEGMENT/NAME",
    "token_ids_logprob": "return the log-probs of these tokens at every position",
    "top_k": "draw among the k likeliest tokens; -1: among all",
    "top_logprobs_num": "return so many of the likeliest tokens at each position",
    "top_p": "draw among the likeliest tokens that make up this probability",
    "topk_prompt_logprobs": "so many of the likeliest tokens at each position of the prompt",
    "topk_sample_logprobs": "so many of the likeliest tokens at each position of the sample",
    "train_attn": "train the matrices of attention",
    "train_mlp": "train the matrices of MLPs and experts",
    "train_unembed": "train the unembedding",
    "training_run_id": "the id of a training run, which is its model's",
    "ttl_seconds": "the checkpoint expires after this time; null: never",
    "user_metadata": "the client's own data, returned with the object",
    "wait": "true: answer with the samples; false: answer with a `request_id`",
    "wandb_config": "write the steps' metrics to Weights & Biases",
    "warning_message": "a message for people about what was done differently",
    "weight_decay": "decoupled weight decay",
    "weight_version": "the version of the weights",
}
"""The meanings of fields and parameters, by name, for those that do not describe themselves."""
_OTHER_WORDS = frozenset(
    {"ChatLogprobs", "CustomLossInput", "RemoteServerInfo", "ServedModelInfo", "ServerInfo"}
)
"""The schemas in which some of these names mean something else."""
_PROTOBUF = {"type": "string", "format": "binary", "description": "a ForwardBackwardRequest"}


def install(app: FastAPI) -> None:
    """Make `app.openapi()` return this document, built once."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    made = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
    components = made.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    _, own = models_json_schema([(ForwardBackward, "validation")], ref_template=_REF)
    schemas |= own["$defs"] | {"Error": _ERROR}
    answers = _answers(responses, openai, sample_requests)
    if twice := schemas.keys() & answers.keys():
        raise ValueError(f"a body and an answer have the same name: {', '.join(twice)}")
    schemas |= answers
    components["securitySchemes"] = {
        "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        "bearer": {"type": "http", "scheme": "bearer"},
    }
    made["security"] = [{"key": []}, {"bearer": []}]
    for path, operations in made["paths"].items():
        for operation in operations.values():
            _complete(path, operation)
            _explain((each["name"], each) for each in operation.get("parameters", []))
    for name, schema in schemas.items():
        if name not in _OTHER_WORDS:
            _explain(schema.get("properties", {}).items())
    for path in ("/api/v1/forward", "/api/v1/forward_backward"):
        made["paths"][path]["post"]["requestBody"] = {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": _REF.format(model="ForwardBackward")}},
                "application/x-protobuf": {"schema": _PROTOBUF},
            },
        }
    return made


def _explain(fields: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Describe fields that do not describe themselves."""
    for name, field in fields:
        if name in _FIELDS:
            field.setdefault("description", _FIELDS[name])


def schema_of(answer: Any) -> dict[str, Any]:
    """Refer to the schema of an answer's type: one TypedDict, a list of them, or a union."""
    if get_origin(answer) in (Union, UnionType):
        return {"anyOf": [schema_of(each) for each in get_args(answer)]}
    if get_origin(answer) is list:
        return {"type": "array", "items": schema_of(*get_args(answer))}
    return {"$ref": _REF.format(model=answer.__name__)}


def _answers(*modules: ModuleType) -> dict[str, Any]:
    """Return the schemas of all types of answers that the modules define."""
    types = [
        each
        for module in modules
        for each in vars(module).values()
        if is_typeddict(each) and each.__module__ == module.__name__ and each.__name__[0] != "_"
    ]
    written: Literal["serialization"] = "serialization"
    adapters = [(each, written, TypeAdapter(each)) for each in types]
    return TypeAdapter.json_schemas(adapters, ref_template=_REF)[1]["$defs"]


def _complete(path: str, operation: dict[str, Any]) -> None:
    answers = operation["responses"]
    for answer in answers.values():
        for content in answer.get("content", {}).values():
            content["schema"] = _described(content["schema"])
    refused = _json({"$ref": _REF.format(model="Error")})
    if path in OPEN_PATHS:
        operation["security"] = []
    for status, meaning in _STATUSES.items():
        if path not in OPEN_PATHS:
            answers[status] = {"description": meaning, "content": refused}
    if path in _POLLS:
        answers["408"] = {
            "description": "no result yet: poll again",
            "content": _json(schema_of(responses.PendingFuture)),
        }
    if path in (*_POLLS, "/api/v1/sample"):
        either = [{"$ref": _REF.format(model="Error")}, schema_of(responses.FailedFuture)]
        answers["400"]["content"] = _json({"anyOf": either})


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the content of an answer in JSON."""
    return {"application/json": {"schema": schema}}


def _described(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the route's own schema of its answer, if it has one, without what FastAPI adds from the
    handler's annotation."""
    named: dict[str, Any] = {key: schema[key] for key in ("$ref", "anyOf") if key in schema}
    return named or schema
