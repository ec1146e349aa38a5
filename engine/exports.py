"""Exports: weights written into files that others read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from ..ckpt import age, digests, expert_files, merged, model_card, peft, stored_parameters, training_state
from ..ckpt.atomic import atomic_directory, size_bytes
from ..ckpt.fp8 import Fp8
from ..model.weight_files import WeightsError
from . import messages
from .base_models import BaseModel
from .errors import UserError


def save_weights(
    base: BaseModel,
    lora: messages.LoraSpec | None,
    weights: Any,
    directory: Path,
    tokenizer: bool = False,
    experts: messages.ExpertForm = "shared",
) -> int:
    """Write an adapter, with its base model's tokenizer and a model card if `tokenizer`, or full weights.

    Returns the size in bytes, as all of these functions do.
    """
    if lora is None:
        return _save_full(base, merged.in_memory(weights), None, 1.0, directory)
    return peft.save_adapter(
        directory,
        weights,
        base.config,
        rank=lora.rank,
        alpha=lora.alpha,
        base_model=base.reference,
        tokenizer_of=base.folder if tokenizer else None,
        experts=experts,
    )


def require_form(base: BaseModel, experts: messages.ExpertForm) -> None:
    """Raise UserError if the model's adapters cannot be written in this form."""
    try:
        expert_files.require_form(base.config, experts)
    except ValueError as error:
        raise UserError(str(error)) from None


def save_merged(base: BaseModel, lora: messages.LoraSpec, adapter: Any, directory: Path) -> int:
    """Write the base model's weights with the adapter merged into them."""
    return _save_full(base, merged.in_memory(base.trainer.base), adapter, lora.alpha / lora.rank, directory)


def save_encrypted(export: Callable[[Path], int], directory: Path, recipients: list[str]) -> int:
    """Write the same files, each encrypted. The folder appears when no plain file is left."""
    with atomic_directory(directory) as writing:
        plain = writing / "plain"
        export(plain)
        for file in sorted(plain.glob("[!.]*")):
            age.encrypt(file, writing / (file.name + age.SUFFIX), recipients)
        shutil.rmtree(plain)
        size = size_bytes(writing)
        digests.write(writing)
    return size


def export_stored(
    base: BaseModel, source: Path | None, directory: Path, fp8: messages.Fp8 | None, merge: bool = True
) -> int:
    """Write full weights: the base model's, or those of a sampler's or a training state's directory.

    Without `merge` the adapter of a training state is written as PEFT reads it. Raises UserError for a
    directory with neither, or with another model's.
    """
    parameters, adapter, scale = merged.in_memory(base.trainer.base), None, 1.0
    try:
        if source is None:
            pass
        elif not source.is_dir():
            raise UserError("the weights are not there (any more): save them again")
        elif peft.is_adapter(source):
            digests.check(source)
            saved = peft.load_adapter(source, base.config)
            adapter, scale = saved.adapter, saved.alpha / saved.rank
        elif not training_state.is_complete(source):
            parameters = stored_parameters.of_folder(source, base.config)
        elif (lora := _lora_of(base, source)) is not None:
            abstract = {"weights": base.trainer.abstract_weights(lora)}
            adapter, scale = training_state.restore(source, abstract)["weights"], lora.alpha / lora.rank
            if not merge:
                return save_weights(base, lora, adapter, directory, tokenizer=True)
        else:
            parameters = stored_parameters.of_training_state(source)
        return _save_full(base, parameters, adapter, scale, directory, fp8)
    except digests.DamagedFiles as error:
        raise UserError("the weights' files are damaged: save them again") from error
    except (peft.AdapterError, WeightsError) as error:
        raise UserError(f"the weights do not fit the model: {error}") from error


def _lora_of(base: BaseModel, state: Path) -> messages.LoraSpec | None:
    metadata = training_state.read_metadata(state)
    if metadata["base_model"] != base.name:
        raise UserError(f"the checkpoint is of another base model than {base.name!r}")
    return metadata["lora"] and msgspec.convert(metadata["lora"], messages.LoraSpec)


def _save_full(
    base: BaseModel,
    parameters: merged.Parameters,
    adapter: Any,
    scale: float,
    directory: Path,
    fp8: messages.Fp8 | None = None,
) -> int:
    return merged.save_merged(
        directory,
        parameters,
        base.config,
        base_folder=base.folder,
        adapter=adapter,
        scale=scale,
        card=model_card.of_model(base.reference),
        fp8=None if fp8 is None else Fp8(fp8.block, tuple(fp8.kept)),
    )
