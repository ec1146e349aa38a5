"""Reads full weights from disk one parameter at a time, from a training state or a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ..model.config import ModelConfig
from ..model.weight_files import MappedTensors
from . import digests, training_state
from .merged import Parameters


def of_training_state(directory: Path) -> Parameters:
    """Return the parameters of a training state. Each is read into host memory when it is requested.

    Raises FileNotFoundError or ValueError if the directory holds no full weights, and DamagedFiles if a file
    has changed since it was written.
    """
    directory = Path(directory).absolute()
    digests.check(directory)
    if training_state.read_metadata(directory)["lora"] is not None:
        raise ValueError(f"training state {directory.name} is of an adapter, not of full weights")

    def parameter(name: str) -> np.ndarray:
        tree: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(("weights", *name.split("."))):
            tree = {key: tree}
        with ocp.PyTreeCheckpointer() as reader:
            restored = reader.restore(
                directory / "arrays",
                ocp.args.PyTreeRestore(item=tree, restore_args=tree, partial_restore=True),
            )
        (array,) = jax.tree.leaves(restored)
        return array

    return parameter


def of_folder(directory: Path, config: ModelConfig) -> Parameters:
    """Return the parameters of a Hugging Face folder, as views of its mapped files.

    Raises WeightsError for a tensor that does not fit `config`, and DamagedFiles if a file has changed since
    it was written."""
    digests.check(directory)
    tensors = MappedTensors(Path(directory))
    parameters = tensors.parameters(config)

    def parameter(name: str) -> Any:
        tensors.forget_pages()
        views = tensors.views(parameters[name])
        return views[0] if parameters[name].layers is None else views

    return parameter
