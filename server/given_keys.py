"""API keys that are given to the server at its start, as `KEY` or `OWNER=KEY`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .ledger.accounts import digest

PREFIX = "tml-"
"""How every key begins: the SDK refuses others before it asks a server."""
_MAX_CHARACTERS = 512
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_KEY = re.compile(rf"{PREFIX}[!-~]+")  # what a header can carry, without spaces


@dataclass(frozen=True)
class GivenKey:
    """One key and its owner. `identifier` is part of the key's digest."""

    owner: str
    digest: bytes

    @property
    def identifier(self) -> str:
        return self.digest.hex()[:12]


def is_owner(name: str) -> bool:
    """Whether a tenant can have this name."""
    return _OWNER.fullmatch(name) is not None


def parse(entries: Iterable[str]) -> list[GivenKey]:
    """Raises ValueError for a key that no client could send, without repeating the key itself.

    Several keys may share an owner, but no two owners may share a key. A key without an owner belongs to a
    tenant of its own.
    """
    found: dict[bytes, GivenKey] = {}
    for number, entry in enumerate(entries, 1):
        key = _parse_entry(entry, number)
        known = found.setdefault(key.digest, key)
        if known.owner != key.owner:
            raise ValueError(f"API key {number}: {known.owner} and {key.owner} have the same key")
    return list(found.values())


def _parse_entry(entry: str, number: int) -> GivenKey:
    entry = entry.strip()
    owner, separator, key = entry.partition("=")
    has_owner = bool(separator) and not owner.startswith(PREFIX)  # a key may contain '='
    if not has_owner:
        owner, key = "", entry
    if has_owner and not is_owner(owner):
        raise ValueError(f"API key {number}: its owner's name must be 1 to 64 letters, digits and . _ - @")
    where = f"API key {number} (of {owner})" if owner else f"API key {number}"
    if not key or key == PREFIX:
        raise ValueError(f"{where} is empty; write {PREFIX}..., or OWNER={PREFIX}...")
    if not key.startswith(PREFIX):
        raise ValueError(f"{where} does not begin with {PREFIX}; clients refuse to send such a key")
    if not _KEY.fullmatch(key) or len(key) > _MAX_CHARACTERS:
        raise ValueError(
            f"{where}: a key has up to {_MAX_CHARACTERS} printable ASCII characters and no spaces"
        )
    of_key = digest(key)
    return GivenKey(owner or f"key-{of_key.hex()[:12]}", of_key)
