"""Models in training, and what each operation does to one of them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np

from ..ckpt import digests, merged, paths, peft, training_state
from ..ckpt.atomic import size_bytes
from ..model.lora import pairs
from . import exports, lora_specs, messages
from .base_models import BaseModel
from .deferred_exports import DeferredExports
from .errors import UserError
from .optimizers import optimizer_families
from .scheduler import ModelOperation
from .tenants import Model, Tenants
from .training.custom_loss_batch import CustomJob
from .training.device_batch import Job
from .training.training_state import TrainingState


@dataclass(frozen=True)
class Writing:
    """An answer that waits for the disk: `output(size_bytes)` once `size_bytes` is known.

    `holds_model`: the model's own weights are being written file by file, and must not change until then.
    """

    size_bytes: Future[int]
    output: Callable[[int], messages.Output]
    holds_model: bool = False


class Models:
    """Executes operations one at a time. `ForwardBackward`s are only checked here; the trainer runs them."""

    def __init__(self, config: messages.EngineConfig, bases: dict[str, BaseModel], tenants: Tenants):
        self._config = config
        self._bases = bases
        self._tenants = tenants
        self._writing: dict[str, Future[int]] = {}
        self._writers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="export")
        self._deferred = DeferredExports()

    def close(self) -> None:
        """Wait for the writes that continue after their answers."""
        self._deferred.close()

    def finish_exports(self) -> None:
        """Wait for the exports; weights that could not be written stay in memory."""
        wait(list(self._writing.values()))
        self._deferred.finish()

    def states_on_device(self) -> list[TrainingState]:
        return self._tenants.states_on_device()

    def base(self, name: str) -> BaseModel:
        """Return a loaded base model. Raises UserError for any other."""
        if name not in self._bases:
            raise UserError(f"unknown base model {name!r}; this server has: {', '.join(self._bases)}")
        return self._bases[name]

    def peek(self, model_id: str) -> Model | None:
        """Return a model whose arrays may not be on the device; None if there is none."""
        return self._tenants.peek(model_id)

    def find(self, model_id: str) -> Model:
        """Return a model with its state on the device. Raises UserError for an unknown model."""
        if model_id not in self._tenants:
            raise UserError(f"unknown model {model_id!r}: it was not created, or it was deleted")
        return self._tenants.use(model_id)

    def job(self, operation: messages.ForwardBackward) -> Job | CustomJob:
        """Check an operation against its model. Raises UserError, which counts for a later optim_step."""
        model = self.find(operation.model_id)
        try:
            return model.base.trainer.job(model.state, operation)
        except UserError:
            if not operation.forward_only:
                model.state.failed_since_step += 1
            raise

    def run(self, operation: ModelOperation) -> messages.Output | Writing:
        """Run any operation but a ForwardBackward. If it raises UserError, the model is unchanged."""
        match operation:
            case messages.CreateModel():
                return self._create(operation)
            case messages.OptimStep():
                model = self.find(operation.model_id)
                params = operation.dimuon or operation.params
                return messages.OptimStepOutput(model.base.trainer.optim_step(model.state, params))
            case messages.DropGradients():
                state = self.find(operation.model_id).state
                state.gradients, state.valid_tokens, state.failed_since_step = None, 0, 0
                return messages.Nothing()
            case messages.SaveState():
                return self._save_state(operation)
            case messages.LoadState():
                return self._load_state(operation)
            case messages.SaveSampler():
                return self._save_sampler(operation)
            case messages.DeleteModel():
                if operation.model_id not in self._tenants:
                    self.find(operation.model_id)
                self._tenants.remove(operation.model_id)
                self._deferred.forget(operation.model_id)
                return messages.Nothing()
        raise TypeError(f"{type(operation).__name__} is not an operation on one model")

    # --- creation and checkpoints -------------------------------------------------------------------------

    def _create(self, operation: messages.CreateModel) -> messages.ModelCreated:
        base = self.base(operation.base_model)
        if operation.model_id in self._tenants:
            raise UserError(f"model {operation.model_id!r} exists already")
        options = optimizer_families.filled(operation.optimizer, operation.optimizer_options)
        if operation.checkpoint is None:
            lora_specs.check(operation.lora, self._config)
            state = base.trainer.create(
                operation.lora,
                operation.grad_normalization,
                operation.optimizer,
                operation.target_alignment,
                options,
            )
        else:
            state = self._restore(base, operation.checkpoint, operation.optimizer, operation.optimizer_state)
            lora_specs.check(state.lora, self._config)
            wanted = operation.lora
            if wanted is not None and lora_specs.shape(wanted) != lora_specs.shape(state.lora):
                raise UserError(
                    f"the checkpoint was trained with {lora_specs.described(state.lora)}, "
                    f"not with {lora_specs.described(operation.lora)}"
                )
            state.grad_normalization = operation.grad_normalization
            state.target_alignment = operation.target_alignment
            state.optimizer_options = options
        self._tenants.add(operation.model_id, base, state)
        return messages.ModelCreated(lora=state.lora, step=state.step)

    def _load_state(self, operation: messages.LoadState) -> messages.StateLoaded:
        model = self.find(operation.model_id)
        state = self._restore(model.base, operation.directory, model.state.family, operation.optimizer_state)
        # The scale comes with the adapter: clients that resume by name do not repeat it.
        if lora_specs.matrices(state.lora) != lora_specs.matrices(model.state.lora):
            raise UserError(
                f"the checkpoint was trained with {lora_specs.described(state.lora)}, this model with "
                f"{lora_specs.described(model.state.lora)}: create a model from the checkpoint instead"
            )
        state.grad_normalization = model.state.grad_normalization
        state.target_alignment = model.state.target_alignment
        state.optimizer_options = model.state.optimizer_options
        model.state = state
        return messages.StateLoaded(state.step)

    def _restore(self, base: BaseModel, key: str, family: str, optimizer_state: bool) -> TrainingState:
        """Return the state of a SaveState, or one with its (or an adapter's) weights and a fresh
        optimizer."""
        if key in self._writing:
            self._writing[key].exception()
        directory = paths.resolve(self._config.data_dir, key)
        if peft.is_adapter(directory):
            if optimizer_state:
                raise UserError("sampler weights have no optimizer state: load them without it")
            return self._restore_adapter(base, directory, family)
        if not training_state.is_complete(directory):
            raise UserError("the checkpoint no longer exists")
        metadata = training_state.read_metadata(directory)
        if metadata.pop("base_model") != base.name:
            raise UserError(f"the checkpoint is of another base model than {base.name!r}")
        metadata.pop("format_version")
        lora = metadata["lora"] and msgspec.convert(metadata["lora"], messages.LoraSpec)
        trainer = base.trainer
        if optimizer_state:
            stored = metadata.get("family", "adamw")
            if stored != family:
                raise UserError(
                    f"the checkpoint's optimizer is {stored}, the model's {family}: load it without its "
                    "optimizer, or create a model from it"
                )
            arrays = training_state.restore(
                directory, trainer.abstract_arrays(lora, metadata["has_gradients"], stored)
            )
            return TrainingState.from_checkpoint(arrays, metadata)
        weights = training_state.restore(directory, {"weights": trainer.abstract_weights(lora)})["weights"]
        return self._fresh(base, lora, weights, family)

    def _restore_adapter(self, base: BaseModel, directory: Path, family: str) -> TrainingState:
        try:
            digests.check(directory)
            saved = peft.load_adapter(directory, base.config, merged.in_memory(base.trainer.base))
        except peft.AdapterError as error:
            raise UserError(str(error)) from error
        parts = {site.part for _, site, _ in pairs(saved.adapter, base.config)}
        lora = messages.LoraSpec(
            saved.rank,
            saved.alpha,
            seed=0,
            train_attn="attn" in parts,
            train_mlp="mlp" in parts,
            train_unembed="unembed" in saved.adapter,
        )
        given = dict(jax.tree_util.tree_leaves_with_path(saved.adapter))

        def place(path: Any, to: jax.ShapeDtypeStruct) -> jax.Array:
            # A matrix without an adapter has zeros for both factors: the gradient of each is then
            # zero too, so that it never gets one.
            leaf = given.get(path)
            return jax.device_put(np.zeros(to.shape, to.dtype) if leaf is None else leaf, to.sharding)

        weights = jax.tree_util.tree_map_with_path(place, base.trainer.abstract_weights(lora))
        return self._fresh(base, lora, weights, family)

    def _fresh(self, base: BaseModel, lora: messages.LoraSpec | None, weights, family: str) -> TrainingState:
        state = TrainingState(lora, weights, None, family=family)
        state.optimizer = base.trainer.fresh_optimizer(state)
        return state

    # --- what goes to disk --------------------------------------------------------------------------------

    def _save_state(self, operation: messages.SaveState) -> Writing:
        model = self.find(operation.model_id)
        directory = paths.resolve(self._config.data_dir, operation.directory)
        metadata = {"base_model": model.base.name, **model.state.metadata()}
        size = training_state.save(directory, model.state.arrays(), metadata)
        # The server then forgets how to replay this, so it must not be in memory alone.
        size = self._deferred.after(operation.model_id, size)
        return Writing(self._track(operation.directory, size), messages.StateSaved)

    def _save_sampler(self, operation: messages.SaveSampler) -> messages.Output | Writing:
        model = self.find(operation.model_id)
        key, directory = operation.directory, paths.resolve(self._config.data_dir, operation.directory)
        if not operation.deferred:
            weights, lora = model.state.weights, model.state.lora
            if lora is not None:
                # A copy, not a view: the next step writes into the arrays' memory meanwhile.
                weights = jax.tree.map(lambda leaf: np.array(leaf, copy=True), weights)
            exports.require_form(model.base, operation.experts)
            write = partial(
                exports.save_weights,
                model.base,
                lora,
                weights,
                tokenizer=operation.tokenizer,
                experts=operation.experts,
            )
            if operation.merged and lora is not None:
                write = partial(exports.save_merged, model.base, lora, weights)
            if operation.recipients:
                write = partial(exports.save_encrypted, write, recipients=operation.recipients)
            size = self._track(key, self._writers.submit(write, directory))
            return Writing(size, messages.SamplerSaved, holds_model=lora is None)
        if directory.is_dir():
            return messages.SamplerSaved(size_bytes(directory))
        base, lora, samplers = model.base, model.state.lora, model.base.samplers
        frozen = samplers.freeze(key, model.state)
        weights = frozen.base if lora is None else frozen.adapter

        def export() -> None:
            exports.save_weights(base, lora, weights, directory)
            samplers.written(key)

        self._deferred.add(operation.model_id, export, operation.urgent)
        return messages.SamplerSaved(sum(leaf.nbytes for leaf in jax.tree.leaves(weights)))

    def export(self, request: messages.ExportWeights) -> Writing:
        """Export weights. Raises UserError for an unknown base model."""
        base, data_dir = self.base(request.base_model), self._config.data_dir
        source = None if request.weights is None else paths.resolve(data_dir, request.weights)
        directory = paths.resolve(data_dir, request.directory)
        write = partial(exports.export_stored, merge=request.merged)
        size = self._writers.submit(write, base, source, directory, request.fp8)
        return Writing(self._track(request.directory, size), messages.SamplerSaved)

    def _track(self, key: str, size: Future[int]) -> Future[int]:
        self._writing[key] = size
        size.add_done_callback(lambda _: self._writing.pop(key, None))
        return size
