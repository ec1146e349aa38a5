"""The trainer: loss, gradients and optimizer steps of any number of models over one frozen base.

The trainer holds the base and the compiled programs; a model is its `TrainingState`. A `DeviceBatch`
has jobs of one or several models, and computes a micro-batch per step (`gradient_programs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ...model import decoder, sharding
from ...model.config import ModelConfig
from ...model.counts import counts
from ...model.lora import init_lora, logical_axes
from .. import memory
from ..budget import Budget
from ..errors import UserError
from ..messages import ForwardBackward, GradNormalization, LoraSpec, TargetAlignment
from ..optimizers import optimizer_families
from ..programs import OnCompile, Programs
from . import validation
from .alignment import align
from .custom_loss_batch import CustomJob, CustomLossBatch, custom_job
from .custom_loss_processes import CustomLossProcesses
from .custom_losses import CustomLosses
from .device_batch import DeviceBatch, Job, JobOutput
from .gradient_accumulation import GradientAccumulation, zeros_like
from .gradient_programs import GradientPrograms
from .packing import shape_table
from .train_step import Static
from .training_state import TrainingState
from .training_structure import describe, structure


class Trainer:
    """Forward, backward and optimizer steps over a base model: `start`, `forward_backward`, `optim_step`."""

    def __init__(
        self,
        graph: Any,
        base: decoder.Base,
        config: ModelConfig,
        mesh: Mesh | None = None,
        *,
        max_sequence_length: int | None = None,
        micro_batch_tokens: int | None = None,
        chunk_tokens: int | None = None,
        remat: str | None = None,
        budget: Budget | None = None,
        kept_bytes: int = memory.KEPT_ON_CPU,
        on_compile: OnCompile | None = None,
        custom_loss_processes: CustomLossProcesses | None = None,
    ):
        """`base` lies on the mesh as `sharding.shardings_for` says (None: one device).

        `micro_batch_tokens` are computed at once (default `memory.micro_batch_on_cpu` on a CPU, 8192 per
        device elsewhere), and of their logits `chunk_tokens` on each device (256, 1024). `remat`: "none",
        "dots", "attention" or "full", by default the fastest that keeps at most `kept_bytes` of a
        micro-batch. Recycled arrays are within the `budget`.
        `on_compile(name, seconds)` hears of every compilation.
        """
        self.config = config
        self.mesh = mesh or sharding.make_mesh(None)
        device = self.mesh.devices.flat[0]
        on_cpu = device.platform == "cpu"
        row_devices = sharding.row_devices(self.mesh)
        self.max_sequence_length = min(
            config.max_sequence_length, max_sequence_length or config.max_sequence_length
        )
        self.shapes = shape_table(
            self.max_sequence_length,
            micro_batch_tokens
            or (memory.micro_batch_on_cpu(counts(config)) if on_cpu else 8192 * row_devices),
            row_devices,
            on_cpu,
        )
        budget = budget or Budget(memory.BUDGET_ON_CPU)
        self.programs = Programs(self.mesh, on_compile)
        self._replicated = sharding.replicated(self.mesh)
        self._base_shardings = sharding.shardings_for(base, decoder.logical_axes(config), self.mesh)
        dtype = base["embed_tokens"]["weight"].dtype
        static = Static(graph, dtype, remat or "full", chunk_tokens or (256 if on_cpu else 1024), False)
        self.gradient_programs = GradientPrograms(
            self.programs, self.mesh, config, base, static, remat, budget, kept_bytes
        )
        self.custom_losses = CustomLosses()
        self.custom_loss_processes = custom_loss_processes or CustomLossProcesses()
        self._accumulation = GradientAccumulation(self.programs, self._replicated, budget)

    @property
    def base(self) -> decoder.Base:
        return self.gradient_programs.base

    @base.setter
    def base(self, weights: decoder.Base) -> None:
        self.gradient_programs.base = weights

    # --- models -----------------------------------------------------------------------------------------

    def create(
        self,
        lora: LoraSpec | None,
        grad_normalization: GradNormalization = "sum",
        family: str = "adamw",
        target_alignment: TargetAlignment = "shifted",
        optimizer_options: optimizer_families.Options | None = None,
    ) -> TrainingState:
        """Return a new model: an adapter whose delta is zero, or with `lora` None a float32 copy of the base.

        Raises UserError for an unknown optimizer or option.
        """
        options = optimizer_families.filled(family, optimizer_options or {})
        if lora is None:
            weights = jax.tree.map(
                lambda w, s: jax.device_put(jnp.array(w, jnp.float32, copy=True), s),
                self.base,
                self._base_shardings,
            )
        else:
            weights = self._init(lora)
            weights = jax.device_put(weights, self._adapter_shardings(weights))
        state = TrainingState(
            lora,
            weights,
            None,
            grad_normalization=grad_normalization,
            family=family,
            target_alignment=target_alignment,
            optimizer_options=options,
        )
        state.optimizer = self.fresh_optimizer(state)
        return state

    def fresh_optimizer(self, state: TrainingState) -> Any:
        """Return an optimizer state of zeros for the state's weights."""
        count = jax.device_put(np.int32(0), self._replicated)
        new_state = optimizer_families.family(state.family).new_state
        return new_state(count, lambda: zeros_like(state.weights))

    def abstract_weights(self, lora: LoraSpec | None) -> Any:
        """Return shapes, dtype and shardings of a model's weights (and of its gradients and moments)."""
        if lora is None:
            shapes, shardings = self.base, self._base_shardings
        else:
            shapes = jax.eval_shape(lambda: self._init(lora))
            shardings = self._adapter_shardings(shapes)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=s), shapes, shardings
        )

    def abstract_arrays(
        self, lora: LoraSpec | None, has_gradients: bool, family: str = "adamw"
    ) -> dict[str, Any]:
        """Return the tree of `TrainingState.arrays` into which a checkpoint is restored."""
        weights = self.abstract_weights(lora)
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._replicated)
        state = optimizer_families.family(family).new_state(count, lambda: weights)
        arrays = {"weights": weights, "optimizer": state._asdict()}
        return arrays | {"gradients": weights} if has_gradients else arrays

    # --- operations -------------------------------------------------------------------------------------

    def job(self, state: TrainingState, operation: ForwardBackward) -> Job | CustomJob:
        """Check an operation against the model. Raises UserError."""
        if operation.loss_fn == "custom":
            limits = self.config.vocab_size, self.max_sequence_length, self.config.routing
            return custom_job(state, operation, self.custom_losses, *limits)
        chosen = validation.check_loss(operation.loss_fn, operation.loss_config)
        data, aligned = operation.data, None
        if state.target_alignment == "by_shape":
            aligned = [align(index, datum, chosen.loss) for index, datum in enumerate(data)]
            data = [each.datum for each in aligned]
        checked = validation.check_data(
            data, chosen, self.config.vocab_size, self.max_sequence_length, self.config.routing
        )
        return Job(
            state, checked, chosen, operation.forward_only, aligned, elementwise=operation.elementwise_loss
        )

    def start(self, jobs: Sequence[Job | CustomJob]) -> DeviceBatch | CustomLossBatch:
        """Pack the jobs, of which all or none are custom, into micro-batches.

        Nothing runs until the batch's first `step`. Until the batch has ended, no other operation on its
        models may run.
        """
        custom = [job for job in jobs if isinstance(job, CustomJob)]
        if custom:
            return CustomLossBatch(custom, self._start_batch, self.custom_loss_processes)
        return self._start_batch([job for job in jobs if isinstance(job, Job)])

    def _start_batch(self, jobs: Sequence[Job]) -> DeviceBatch:
        return DeviceBatch(jobs, self.shapes, self.gradient_programs, self._accumulation)

    def forward_backward(self, jobs: Sequence[Job | CustomJob]) -> list[JobOutput | Exception]:
        """Run the jobs to the end; return one output or error per job (`DeviceBatch`)."""
        batch = self.start(jobs)
        while not batch.step():
            pass
        return batch.results

    def optim_step(self, state: TrainingState, params: optimizer_families.Params) -> dict[str, float]:
        """Take a step with the accumulated gradients, which are then dropped; return metrics.

        Without any gradient since the last step, gradients are zero; but if all computations of gradients
        since then have failed, so does the step. Raises UserError for that, for parameters out of range or of
        another optimizer, and for a norm that is not finite; the weights are then unchanged.
        """
        family = optimizer_families.family(state.family)
        if not isinstance(params, family.params):
            raise UserError(f"this model's optimizer is {state.family}; the step's parameters are of another")
        validation.check_optimizer(params)
        if state.gradients is None and state.failed_since_step:
            raise UserError(
                "nothing to step with: every forward_backward since the last optim_step has failed; "
                "repeat one that succeeds first"
            )
        gradients = self._accumulation.zeros(state) if state.gradients is None else state.gradients
        mean = state.grad_normalization == "token_mean"
        grad_scale = 1 / max(1, state.valid_tokens) if mean else 1
        rank = 0 if state.lora is None else state.lora.rank
        scalars = family.hyperparameters(params, state.optimizer_options, grad_scale, rank)
        hyper = jax.device_put(scalars, self._replicated)
        arguments = (state.weights, state.optimizer, gradients, hyper)
        program = self._optimizer_program(state.family, self.structure(state), arguments)
        state.weights, state.optimizer, zeros, norms = program(*arguments)
        state.gradients, state.valid_tokens = None, 0
        self._accumulation.recycle(state, zeros)
        norms = jax.device_get(norms)
        if not all(np.isfinite(norm) for norm in norms):
            state.failed_since_step = 1
            raise UserError(
                f"the step is not finite (gradient norm {norms.gradient}, update norm {norms.update}): "
                "the weights are as before and the accumulated gradients are dropped; "
                "lower the learning rate or the loss's weights"
            )
        state.failed_since_step = 0
        state.step += 1
        return {
            "grad_norm": float(norms.gradient),
            "update_norm": float(norms.update),
            "weight_norm": float(norms.weights),
            "learning_rate": params.learning_rate,
            # not "step": clients merge these into their own metrics, and count their own steps
            "optimizer_step": float(state.step),
        }

    def warm_up(
        self, lora: LoraSpec | None, shapes: Sequence[tuple[int, int]] | None = None
    ) -> list[jax.stages.Compiled]:
        """Compile what one model of this kind needs for micro-batches of `shapes` (T, B), by default all;
        return the programs.

        The base may be abstract.
        """
        return self.gradient_programs.warm_up(
            lora, self.abstract_weights(lora), self.shapes.shapes if shapes is None else shapes
        )

    def warm_up_optimizer(self, lora: LoraSpec | None, family: str = "adamw") -> jax.stages.Compiled:
        """Compile one step of an optimizer for a model of this kind, and return it. The base may be
        abstract."""
        weights, chosen = self.abstract_weights(lora), optimizer_families.family(family)
        scalar = partial(jax.ShapeDtypeStruct, (), sharding=self._replicated)
        state = chosen.new_state(scalar(jnp.int32), lambda: weights)
        options, rank = optimizer_families.filled(family, {}), 0 if lora is None else lora.rank
        hyper = chosen.hyperparameters(chosen.params(learning_rate=1e-4), options, 1.0, rank)
        hyper = jax.tree.map(lambda x: scalar(x.dtype), hyper)
        return self._optimizer_program(family, structure(lora), (weights, state, weights, hyper))

    def _optimizer_program(self, family: str, key: Any, arguments: tuple) -> jax.stages.Compiled:
        """The step of `arguments`: weights, the optimizer's state, gradients and hyper-parameters."""
        weights, moments = (sharding.shardings_of(tree) for tree in arguments[:2])
        name = "optim_step" if family == "adamw" else f"optim_step {family}"
        return self.programs.get(
            (name, key),
            f"{name} {describe(key)}",
            optimizer_families.family(family).step,
            arguments,
            donate=(0, 1, 2),
            out_shardings=(weights, moments, weights, self._replicated),
        )

    def structure(self, state: TrainingState) -> Any:
        """Return what must be equal for adapters to share a batch; None for full weights."""
        return structure(state.lora)

    def forget_zeros(self) -> None:
        """Free the zero trees that are kept for later batches."""
        self._accumulation.forget_zeros()

    def _adapter_shardings(self, adapter: Any) -> Any:
        return sharding.shardings_for(adapter, logical_axes(adapter, self.config), self.mesh)

    def _init(self, lora: LoraSpec) -> Any:
        return init_lora(
            self.config,
            lora.seed,
            lora.rank,
            train_attn=lora.train_attn,
            train_mlp=lora.train_mlp,
            train_unembed=lora.train_unembed,
        )
