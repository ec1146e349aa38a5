"""Errors that the engine reports to clients."""

from __future__ import annotations

import errno

from ..ckpt.digests import DamagedFiles


class UserError(Exception):
    """The request was wrong. The message names the place (datum index, field) and what would be right."""


class MissingWeights(UserError):
    """Sampler weights are neither in memory nor on disk."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether XLA could not allocate memory on the device."""
    return "RESOURCE_EXHAUSTED" in str(error)


def reason(error: BaseException) -> str:
    """Return what the client is told of an internal error; the log has the rest."""
    if isinstance(error, DamagedFiles):
        return "the checkpoint's files are damaged"
    text = str(error)
    no_room = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if no_room or "No space left on device" in text or "ENOSPC" in text:
        return "the server's disk is full; nothing was saved, save again when there is room"
    if is_out_of_memory(error):
        return "the device is out of memory"
    return "internal error"
