"""Keys of tenants' SGLang servers, encrypted at rest.

The ledger has them as age files (https://age-encryption.org/v1) for an identity that is in the data directory
beside it, in a file that only the server's user can read: a copy of the ledger alone opens nothing.
"""

from __future__ import annotations

import base64
import binascii
from functools import cached_property
from pathlib import Path

import pyrage

from ...private_files import read_or_create


class EndpointKeys:
    """Without the identity's file, all keys that were sealed with it have to be given again."""

    def __init__(self, data_dir: Path):
        self._file = data_dir / "endpoint_identity"

    @cached_property
    def _identity(self) -> pyrage.x25519.Identity:
        text = read_or_create(self._file, lambda: str(pyrage.x25519.Identity.generate()).encode()).decode()
        try:
            return pyrage.x25519.Identity.from_str(text.strip())
        except pyrage.IdentityError:
            raise OSError(f"{self._file} is damaged; remove it, and the server makes a new one") from None

    def seal(self, key: str) -> str:
        encrypted = pyrage.encrypt(key.encode(), [self._identity.to_public()])
        return base64.b64encode(encrypted).decode()

    def unseal(self, sealed: str) -> str | None:
        """None for one that was sealed for another identity, or is damaged."""
        try:
            return pyrage.decrypt(base64.b64decode(sealed, validate=True), [self._identity]).decode()
        except (pyrage.DecryptError, binascii.Error, UnicodeDecodeError):
            return None
