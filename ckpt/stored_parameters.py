"""Reads full weights from disk one parameter at a time, from a training state or a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ..model import decoder
from ..model.config import ModelConfig
from ..model.load import hf_views
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
    names = tensors.names(config)
    _, abstract = decoder.build(config, jnp.float32)
    shapes = {
        ".".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }

    def parameter(name: str) -> Any:
        tensors.forget_pages()
        views = list(hf_views(tensors, name, names[name], shapes[name]))
        return views if "{layer}" in names[name] else views[0]

    return parameter
