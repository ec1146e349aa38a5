"""Turns the body of `create_model` into what the engine and the ledger need, and into the operation.

A field that is accepted but not honoured as it was sent gets a warning, for the answer's `warning_message`.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from ...engine import messages
from ..base_models import BaseModels
from ..checkpoints import Checkpoints
from ..dialect import DIALECT_RULES, Dialect
from ..errors import BadRequest, NotFound
from ..ledger.tenancy import model_id
from ..models.run import RLVE, WANDB, ModelSpec, NewRun
from ..models.runs import Runs
from ..models.sessions import Named, NamedModels, Sessions, check_name, described, warnings_of
from ..models.submits import Admission
from ..operations.operation import Operation
from ..plugins.rlve.runs import RlveRuns, rlve_of
from ..plugins.wandb import WandbRuns
from ..settings import Settings
from ..wire import DEFAULT_MODEL
from ..wire import requests as wire

TIED = (
    "train_unembed: this base model's embeddings are tied. The adapter of the unembedding is right beside "
    "the model, but PEFT's merge_and_unload and the cookbook's build_hf_model cannot merge it. For merged "
    "weights run `tinsmith checkpoints merge`, or call save_weights_external with merged: true; or create "
    "the model with train_unembed false"
)
OPTIMIZERS = ("adamw", "dimuon", "sgd", "signsgd", "muon")
_MODULES = {
    "train_attn": frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}),
    "train_mlp": frozenset({"gate_proj", "up_proj", "down_proj"}),
    "train_unembed": frozenset({"lm_head"}),
}
_STEP_DEFAULTS = ("learning_rate", "weight_decay", "eps")


def model_spec(
    body: wire.CreateModel,
    model_id: str,
    dialect: Dialect,
    settings: Settings,
    max_sequence_length: int | None = None,
    is_tied: bool = False,
    modules: Mapping[str, frozenset[str]] | None = None,
) -> ModelSpec:
    """Return the model that a body describes.

    `max_sequence_length`, `is_tied` and `modules` (`BaseModel.adapter_modules`) are the base model's. Raises
    BadRequest naming a field that cannot be honoured."""
    points = DIALECT_RULES[dialect]
    warnings: list[str] = []
    if body.objective != "language_modeling" or body.num_labels is not None or body.head_config is not None:
        raise BadRequest("objective: this server trains language models; it has no classification heads")
    optimizer = optimizer_of(body.optimizer_config, warnings)
    rlve = rlve_of(body, optimizer["type"], settings, warnings)
    lora_config = body.lora_config
    if dialect == "xorl" and settings.full_weight and _is_xorls_full_weights(lora_config):
        lora_config = wire.LoraConfig(rank=0)
        warnings.append(
            "lora_config: a rank of 32 and nothing else is what xorl-client asks full weights with; for an "
            "adapter send dropout (0.0) too"
        )
    message = messages.CreateModel(
        request_id="",
        model_id=model_id,
        base_model=body.base,
        lora=lora_of(settings, lora_config, points.default_rank, warnings, modules),
        optimizer=optimizer["type"],
        grad_normalization=body.grad_normalization or points.grad_normalization,
        target_alignment=body.target_alignment or points.target_alignment,
        optimizer_options=optimizer.get("optimizer_kwargs", {}),
    )
    if is_tied and message.lora is not None and message.lora.train_unembed:
        warnings.append(TIED)
    if body.parallelism_config is not None:
        warnings.append("parallelism_config: the server's devices and mesh are chosen at its start")
    if max_sequence_length is not None and (body.max_seq_len or 0) > max_sequence_length:
        warnings.append(
            f"max_seq_len: {body.max_seq_len} is over the base model's limit; datums may have "
            f"{max_sequence_length} tokens"
        )
    if (body.max_batch_size or 0) > settings.max_datums:
        warnings.append(
            f"max_batch_size: {body.max_batch_size} is over this server's limit; a request may have "
            f"{settings.max_datums} datums"
        )
    configuration: dict[str, Any] = {
        "max_batch_size": body.max_batch_size,
        "max_seq_len": body.max_seq_len,
        "train_only": body.debug_train_only or None,
        WANDB: _wandb(body),
        RLVE: None if rlve is None else {"config": rlve},
        "steps": step_defaults(body.optimizer_config) or None,
    }
    kept = {key: value for key, value in configuration.items() if value is not None}
    return ModelSpec(message, optimizer, kept, warnings)


def _is_xorls_full_weights(config: wire.LoraConfig | None) -> bool:
    """Return whether `create_training_client` of xorl-client 0.1.0 has sent this.

    Its `create_lora_training_client` always sends a dropout too.
    """
    return config is not None and config.model_fields_set == {"rank"} and config.rank == 32


def _wandb(body: wire.CreateModel) -> dict[str, str] | None:
    config = body.wandb_config
    return config.configuration if config is not None and config.enabled else None


def optimizer_of(config: wire.OptimizerConfig | None, warnings: list[str] | None = None) -> dict[str, Any]:
    """Return a model's optimizer as the ledger keeps it. Raises BadRequest for an unknown family."""
    chosen = config or wire.OptimizerConfig()
    warnings = [] if warnings is None else warnings
    fields = chosen.model_extra or {}
    if chosen.type == "dimuon":
        if set(fields) - {"version"} or fields.get("version", 1) != 1 or chosen.optimizer_kwargs:
            raise BadRequest(
                "optimizer_config: of dimuon this server has version 1, which has no other fields"
            )
        return {"type": "dimuon", "version": 1}
    family = chosen.type
    if family == "anyprecision_adamw":
        family = "adamw"
        warnings.append("optimizer_config: anyprecision_adamw is adamw here; its moments are float32")
    if family not in OPTIMIZERS:
        raise BadRequest(
            f"optimizer_config: unknown type {family[:64]!r}; this server has {', '.join(OPTIMIZERS)}"
        )
    if chosen.optimizer_dtype in ("bf16", "bfloat16"):
        warnings.append("optimizer_config.optimizer_dtype: moments are float32 here")
    if fields:
        warnings.append(f"optimizer_config: not known here: {_named(fields)}")
    described: dict[str, Any] = {"type": family, **step_defaults(chosen)}
    if chosen.optimizer_kwargs:
        described["optimizer_kwargs"] = _options(chosen)
    return described


def _options(config: wire.OptimizerConfig) -> dict[str, Any]:
    """Return the family's own options. xorl's learning rate for Muon becomes a factor of the steps' rate."""
    options = dict(config.optimizer_kwargs or {})
    rate = options.pop("muon_lr", None)
    if rate is None:
        return options
    if isinstance(rate, (str, bool)) or not config.learning_rate:
        raise BadRequest(
            "optimizer_config.optimizer_kwargs.muon_lr: a number beside optimizer_config.learning_rate, "
            "whose ratio is kept; or send muon_lr_factor"
        )
    return options | {"muon_lr_factor": rate / config.learning_rate}


def step_defaults(config: wire.OptimizerConfig | None) -> dict[str, float]:
    """Return the defaults for steps that leave a hyper-parameter out, as fields of `messages.AdamParams`."""
    if config is None:
        return {}
    values = {name: getattr(config, name) for name in _STEP_DEFAULTS}
    if config.betas is not None:
        values["beta1"], values["beta2"] = config.betas
    return {name: value for name, value in values.items() if value is not None}


def lora_of(
    settings: Settings,
    config: wire.LoraConfig | None,
    default_rank: int = 0,
    warnings: list[str] | None = None,
    modules: Mapping[str, frozenset[str]] | None = None,
) -> messages.LoraSpec | None:
    """Return the adapter that a body describes; None trains the full weights.

    `modules` are `BaseModel.adapter_modules`. Raises BadRequest naming a field that cannot be honoured."""
    if config is None and default_rank:
        config = wire.LoraConfig(rank=min(default_rank, settings.max_rank))
    if config is None or config.rank == 0:
        if not settings.full_weight:
            raise BadRequest(
                f"lora_config: this server trains adapters only; ask for a rank of 1 to {settings.max_rank} "
                "(or start it with --full-weight)"
            )
        return None
    if config.rank > settings.max_rank:
        raise BadRequest(
            f"lora_config.rank: {config.rank} is over this server's maximum of {settings.max_rank}"
        )
    if config.dropout:
        raise BadRequest(f"lora_config.dropout: {config.dropout}; adapters have no dropout here: send 0")
    if config.alpha == 0:
        raise BadRequest("lora_config.alpha: 0 would switch the adapter off; leave it out, or send more")
    if config.model_extra and warnings is not None:
        warnings.append(f"lora_config: not known here: {_named(config.model_extra)}")
    kinds = _kinds(config, modules or {})
    if not any(kinds.values()):
        raise BadRequest("lora_config: nothing to train; set train_attn, train_mlp or train_unembed")
    return messages.LoraSpec(
        rank=config.rank,
        alpha=config.alpha or settings.lora_alpha,
        seed=secrets.randbelow(1 << 31) if config.seed is None else config.seed % (1 << 31),
        **kinds,
    )


def _kinds(config: wire.LoraConfig, modules: Mapping[str, frozenset[str]]) -> dict[str, bool]:
    """Return which kinds of matrices carry the adapter. Raises BadRequest for a part of a kind.

    `target_modules` may have the model's own names or the usual ones."""
    kinds = {kind: bool(getattr(config, kind)) for kind in _MODULES}
    if config.target_modules is None or config.target_modules in (["all-linear"], ["all"]):
        return kinds
    wanted = set(config.target_modules)
    known: frozenset[str] = frozenset()
    for kind, usual in _MODULES.items():
        names = modules.get(kind.removeprefix("train_"), usual)
        all_of_kind = names <= wanted or usual <= wanted
        if wanted & (names | usual) and not all_of_kind:
            raise BadRequest(
                f"lora_config.target_modules: adapters are on all of {', '.join(sorted(names))} or none; "
                f"{', '.join(sorted(names - wanted))} is missing"
            )
        kinds[kind] = kinds[kind] and all_of_kind
        known |= names | usual
    unknown = wanted - known
    if unknown:
        raise BadRequest(f"lora_config.target_modules: no such matrices: {_named(sorted(unknown))}")
    return kinds


def _named(names: Any) -> str:
    return ", ".join(repr(str(name)[:64]) for name in list(names)[:8])


@dataclass(frozen=True)
class ModelCreations:
    """Creates the models that bodies of `create_model` and `create_session` ask for."""

    settings: Settings
    base_models: BaseModels
    runs: Runs
    sessions: Sessions
    named_models: NamedModels
    checkpoints: Checkpoints
    admission: Admission
    wandb: WandbRuns
    rlve: RlveRuns

    async def create(
        self, owner: str, body: wire.CreateModel, base_url: str, requested: Dialect | None
    ) -> tuple[Operation, dict[str, str]]:
        """Create a model; return the operation, and the warnings for its answer. Raises ApiError."""
        dialect: Dialect = requested or ("xorl" if body.model_id is not None else "tinkercloud")
        base_model = self.base_models.named(body.base)
        is_tied, modules = await asyncio.to_thread(lambda: (base_model.is_tied, base_model.adapter_modules))
        spec = model_spec(body, "", dialect, self.settings, base_model.max_sequence_length, is_tied, modules)
        if WANDB in spec.configuration:
            self.wandb.check()
        if body.checkpoint_path is not None:
            spec = await self._from_checkpoint(spec, body, owner)
        if (rlve := spec.configuration.get(RLVE)) is not None:
            rlve["difficulties"] = await self.rlve.difficulties(rlve["config"], body.base)
        reply = described(spec, base_url)
        if body.session_id is not None and body.model_seq_id is not None:
            session_id = await self.sessions.of_client(owner, body.session_id, dialect)
            operation = await self._create(spec, body, session_id, dialect, reply, owner)
        else:
            name = body.model_id or (DEFAULT_MODEL if dialect == "xorl" else None)
            if name is not None:
                check_name(name)
            operation = await self.named_models.open(
                Named(
                    owner,
                    name,
                    spec,
                    dialect,
                    reply,
                    body.user_metadata or {},
                    any_alpha=body.lora_config is None or body.lora_config.alpha is None,
                )
            )
        if WANDB in spec.configuration and body.wandb_config and body.wandb_config.api_key:
            self.wandb.remember(operation.model_id, body.wandb_config.api_key.get_secret_value())
        return operation, warnings_of(spec)

    async def create_with_session(
        self, owner: str, body: wire.CreateSession, fields: dict[str, Any], base_url: str, dialect: Dialect
    ) -> tuple[str, str, list[str]]:
        """Create a session and a model in it that share a name. `fields`: those of the session.

        Return the name, the base model's name, and warnings. Raises BadRequest.
        """
        base_model = body.base_model or next(iter(self.base_models), "")
        self.base_models.named(base_model)
        model = wire.CreateModel(base_model=base_model, lora_config=body.lora_config)
        spec = model_spec(model, "", dialect, self.settings)
        name = body.session_id or uuid.uuid4().hex
        if body.session_id is not None:
            check_name(name)
        session = fields | {"display_name": body.display_name or name}
        named = Named(owner, name, spec, dialect, described(spec, base_url), session=session)
        await self.named_models.open(named)
        return name, base_model, spec.warnings

    async def _create(
        self,
        spec: ModelSpec,
        body: wire.CreateModel,
        session_id: str,
        dialect: Dialect,
        reply: dict[str, Any],
        owner: str,
    ) -> Operation:
        identifier = model_id(session_id, body.model_seq_id or 0)
        await self._require_unused(owner, identifier, body.model_seq_id)
        with self.admission.model(owner, identifier, self.runs.alive(owner)):
            return await self.runs.create(
                NewRun(
                    owner,
                    session_id,
                    f"create/{session_id}/{body.model_seq_id}",
                    msgspec.structs.replace(spec.message, model_id=identifier),
                    spec.optimizer,
                    body.user_metadata or {},
                    reply | {"model_id": identifier},
                    dialect,
                    configuration=spec.configuration,
                )
            )

    async def _require_unused(self, owner: str, identifier: str, number: int | None) -> None:
        """Raise BadRequest for the number of a deleted model, whose creation the request does not repeat."""
        try:
            run = await self.runs.find(owner, identifier)
        except NotFound:
            return
        if run.state == "finished":
            raise BadRequest(
                f"model_seq_id: {number} of this session is a deleted model's, or a copied checkpoint's; "
                "use the next one, or another session_id"
            )

    async def _from_checkpoint(self, spec: ModelSpec, body: wire.CreateModel, owner: str) -> ModelSpec:
        """Return `spec` with the weights and the optimizer state of a checkpoint. Raises BadRequest."""
        checkpoint = await self.checkpoints.find_loadable(owner, body.checkpoint_path or "")
        lora = None if checkpoint.lora is None else msgspec.convert(checkpoint.lora, messages.LoraSpec)
        if checkpoint.base_model != spec.message.base_model:
            raise BadRequest(f"checkpoint_path: it was trained from {checkpoint.base_model!r}")
        if body.lora_config is not None and (lora.rank if lora else 0) != body.lora_config.rank:
            raise BadRequest(
                f"checkpoint_path: it has LoRA rank {lora.rank if lora else 0}, lora_config asks for "
                f"{body.lora_config.rank}; leave lora_config out"
            )
        if checkpoint.optimizer["type"] != spec.optimizer["type"]:
            raise BadRequest(f"checkpoint_path: it was trained with {checkpoint.optimizer['type']}")
        message = msgspec.structs.replace(spec.message, lora=lora, checkpoint=checkpoint.directory)
        return ModelSpec(message, spec.optimizer, spec.configuration, spec.warnings)
