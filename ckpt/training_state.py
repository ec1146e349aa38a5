"""Saves and restores training state: a pytree of arrays with JSON metadata, as one atomic Orbax checkpoint.

    saving = save(directory, {"weights": ..., "optimizer": ...}, {"step": 3})  # returns after the host copy
    saving.result()                                                            # durable; its size in bytes
    metadata = read_metadata(directory)
    arrays = restore(directory, {"weights": abstract_weights})                 # leaves the optimizer on disk

Orbax writes into a temporary directory and renames it, so a directory under its final name is complete.
Arrays are stored whole, whatever their sharding, and are restored in the requested sharding.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from . import digests
from .atomic import flush, size_bytes

FORMAT_VERSION = 1

PyTree = Any

# The threads wait for the file system, so a few saves of different models can run at once.
_writers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="checkpoint")


def save(directory: Path, arrays: PyTree, metadata: dict[str, Any]) -> Future[int]:
    """Start writing a checkpoint. Returns as soon as the arrays may change or be donated.

    The future completes when the checkpoint is complete and flushed to disk under its final name. Its result
    is the size in bytes. An existing directory of that name is replaced: it is the same save, repeated after
    a crash.
    """
    directory = Path(directory).absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(directory)
    # A checkpointer does one save at a time and blocks on the next, so every save gets a new one.
    checkpointer = ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(
            arrays=ocp.PyTreeCheckpointHandler(), metadata=ocp.JsonCheckpointHandler()
        )
    )
    try:
        checkpointer.save(
            directory,
            ocp.args.Composite(
                arrays=ocp.args.PyTreeSave(arrays),
                metadata=ocp.args.JsonSave({"format_version": FORMAT_VERSION, **metadata}),
            ),
            force=True,
        )
    except BaseException:
        _remove_unfinished(directory)
        raise

    def finish() -> int:
        try:
            with checkpointer:
                checkpointer.wait_until_finished()
            digests.write(directory)
            flush(directory)
        except BaseException:  # a full disk, say; remove the incomplete files, which would take up space
            _remove_unfinished(directory)
            raise
        return size_bytes(directory)

    return _writers.submit(finish)


def is_complete(directory: Path) -> bool:
    """Return whether the directory holds a complete checkpoint in a readable format."""
    return (Path(directory) / "metadata" / "metadata").is_file() and (Path(directory) / "arrays").is_dir()


def read_metadata(directory: Path) -> dict[str, Any]:
    """Return the JSON metadata of a complete checkpoint.

    Raises FileNotFoundError if there is none, and ValueError if a later version of Tinsmith wrote it.
    """
    directory = Path(directory).absolute()
    if not is_complete(directory):
        raise FileNotFoundError(f"no complete training state in {directory.name}")
    metadata = json.loads((directory / "metadata" / "metadata").read_text())
    if metadata["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"training state {directory.name} has format {metadata['format_version']}; "
            f"this version reads up to {FORMAT_VERSION}"
        )
    return metadata


def restore(directory: Path, abstract: PyTree) -> PyTree:
    """Return the arrays of a checkpoint, in the structure, dtypes and shardings of `abstract`.

    `abstract` holds arrays or `jax.ShapeDtypeStruct`s. Subtrees that it leaves out are not read. Raises
    ValueError if a leaf is missing or its shape differs, and DamagedFiles if a file has changed since the
    save.
    """
    directory = Path(directory).absolute()
    digests.check(directory)
    read_metadata(directory)
    abstract = jax.tree.map(_with_sharding, abstract)
    with ocp.PyTreeCheckpointer() as reader:
        _check_shapes(abstract, reader.metadata(directory / "arrays").item_metadata.tree)
        return reader.restore(
            directory / "arrays",
            ocp.args.PyTreeRestore(
                item=abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=True,
            ),
        )


def _remove_unfinished(directory: Path) -> None:
    """Remove the remains of a write that failed or whose process died."""
    for path in directory.parent.glob(directory.name + ".orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)


def _with_sharding(leaf) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)


def _check_shapes(abstract: PyTree, stored: PyTree) -> None:
    shapes = {
        jax.tree_util.keystr(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(stored)
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        name = jax.tree_util.keystr(path)
        if shapes.get(name) != leaf.shape:
            found = f"has shape {shapes[name]}" if name in shapes else "is missing"
            raise ValueError(f"training state: {name} {found}; expected shape {leaf.shape}")
