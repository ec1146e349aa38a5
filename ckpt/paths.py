"""Names of checkpoints, `tinker://` URIs, and directory keys below the data directory.

This module handles text and paths only: the server imports it, so it must not import an array library.

A checkpoint has three names:

- the client's *name*, `step-100`;
- the *URI* that clients use, `tinker://<run>/<segment>/<name>`, where the run is the id of the model that
  saved it;
- the *directory key*, `checkpoints/<run>/<segment>/<name>-<uid>`. The server makes a new one for every save,
  so that saving again under an old name never writes into a directory that is being read.

Every function raises ValueError with a message that says what would be right.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Segment = Literal["weights", "sampler_weights", "external_weights"]
SEGMENTS: tuple[Segment, ...] = get_args(Segment)
CheckpointType = Literal["training", "sampler", "external"]
CHECKPOINT_TYPES: dict[Segment, CheckpointType] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}

SCHEME = "tinker://"
XORL_SCHEME = "xorl://"  # names the same checkpoints

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,191}", re.ASCII)
_KEY_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@-]{0,254}", re.ASCII)


def check_name(name: str) -> str:
    """Return the name of a checkpoint unchanged. Raises ValueError if it is not valid."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            f"invalid checkpoint name {_shown(name)}: use 1 to 128 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit, without '..'"
        )
    return name


def check_id(identifier: str, kind: str = "model") -> str:
    """Return the id of a model, session or sampler unchanged. Raises ValueError if it is not valid.

    `kind` is for the message."""
    if not isinstance(identifier, str) or not _ID.fullmatch(identifier) or ".." in identifier:
        raise ValueError(
            f"invalid {kind} id {_shown(identifier)}: use 1 to 192 letters, digits, '.', '_', ':' or '-', "
            "beginning with a letter or digit, without '..'"
        )
    return identifier


def check_segment(segment: str) -> Segment:
    if segment not in SEGMENTS:
        raise ValueError(f"invalid checkpoint segment {_shown(segment)}: use one of {', '.join(SEGMENTS)}")
    return segment  # type: ignore[return-value]


@dataclass(frozen=True)
class CheckpointUri:
    """`tinker://<run>/<segment>/<name>`; `str()` of it is the URI."""

    run: str
    segment: Segment
    name: str

    def __post_init__(self):
        check_id(self.run, "run")
        check_segment(self.segment)
        check_name(self.name)

    @property
    def checkpoint_id(self) -> str:
        """`<segment>/<name>`, which identifies the checkpoint within its run."""
        return f"{self.segment}/{self.name}"

    @property
    def checkpoint_type(self) -> CheckpointType:
        return CHECKPOINT_TYPES[self.segment]

    def __str__(self) -> str:
        return f"{SCHEME}{self.run}/{self.checkpoint_id}"


def parse_uri(uri: str) -> CheckpointUri:
    """Parse `tinker://<run>/<segment>/<name>`, or the same with `xorl://`."""
    scheme = next(
        (each for each in (SCHEME, XORL_SCHEME) if isinstance(uri, str) and uri.startswith(each)), ""
    )
    parts = uri.removeprefix(scheme).split("/") if scheme else []
    if len(parts) != 3:
        raise ValueError(
            f"invalid checkpoint path {_shown(uri)}: expected {SCHEME}<run>/<segment>/<name> "
            f"with a segment of {', '.join(SEGMENTS)}"
        )
    return CheckpointUri(parts[0], check_segment(parts[1]), parts[2])


def parse_short(text: str, run: str, segment: Segment) -> CheckpointUri:
    """Parse a URI or one of its short forms.

    These are `<segment>/<run>/<name>`, `<segment>/<name>`, `<run>/<name>` and `<name>`. `run` and `segment`
    stand in for the parts that are left out."""
    if "://" in text:
        return parse_uri(text)
    parts = text.split("/")
    if len(parts) > 1 and parts[0] in SEGMENTS:
        segment = check_segment(parts.pop(0))
    name = parts.pop()
    if len(parts) > 1:
        raise ValueError(
            f"invalid checkpoint {_shown(text)}: expected <segment>/<run>/<name>, less of it, or a URI"
        )
    return CheckpointUri(parts[0] if parts else run, segment, name)


def format_uri(run: str, segment: str, name: str) -> str:
    return str(CheckpointUri(run, check_segment(segment), name))


def parse_checkpoint_id(run: str, checkpoint_id: str) -> CheckpointUri:
    """Parse `<segment>/<name>`, as in REST paths, into a checkpoint of the run."""
    return parse_uri(f"{SCHEME}{run}/{checkpoint_id}")


def new_directory(run: str, segment: str, name: str) -> str:
    """Make a directory key that is unique to this save."""
    uri = CheckpointUri(run, check_segment(segment), name)
    # ':' has a meaning to some file systems and array stores. No id contains '@', so this is one to one.
    return f"checkpoints/{uri.run.replace(':', '@')}/{uri.segment}/{uri.name}-{uuid.uuid4().hex[:16]}"


def check_key(key: str) -> str:
    """Return a directory key unchanged.

    Raises ValueError unless it is relative, of plain parts joined by '/'."""
    if (
        not isinstance(key, str)
        or len(key) > 1024
        or not all(_KEY_PART.fullmatch(part) and ".." not in part for part in key.split("/"))
    ):
        raise ValueError(f"invalid directory key {_shown(key)}: expected plain parts joined by '/'")
    return key


def resolve(data_dir: str | Path, key: str) -> Path:
    """Return the absolute directory of a key. It is below `data_dir`, even after following symbolic links."""
    root = Path(data_dir).resolve()
    path = (root / check_key(key)).resolve()
    if path == root or not path.is_relative_to(root):
        raise ValueError(f"invalid directory key {_shown(key)}: it leads out of the data directory")
    return path


def _shown(text: object) -> str:
    """Return a client's text, quoted and shortened for a message or a log."""
    shown = repr(text)
    return shown if len(shown) <= 160 else shown[:157] + "..."
