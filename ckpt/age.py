"""Encrypts files with age (https://age-encryption.org/v1), so that only the holders of an identity can read
them.

Recipients are public keys of age (`age1...`) or SSH (`ssh-ed25519 ...`, `ssh-rsa ...`). The identity of any
one of them decrypts the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SUFFIX = ".age"
MAX_RECIPIENTS = 10
_MAX_RECIPIENT_CHARACTERS = 4096


def check_recipients(recipients: Sequence[str]) -> None:
    """Check that all are recipients. Raises ValueError with the number of the first invalid one."""
    if not 1 <= len(recipients) <= MAX_RECIPIENTS:
        raise ValueError(
            f"{len(recipients)} recipients; give 1 to {MAX_RECIPIENTS}, or none for unencrypted files"
        )
    for number, recipient in enumerate(recipients):
        _parsed(recipient, number)


def encrypt(plain: Path, encrypted: Path, recipients: Sequence[str]) -> None:
    """Encrypt one file, a piece at a time."""
    import pyrage

    keys = [_parsed(recipient, number) for number, recipient in enumerate(recipients)]
    pyrage.encrypt_file(str(plain), str(encrypted), keys)


def _parsed(recipient: str, number: int) -> Any:
    import pyrage

    kind = pyrage.ssh if recipient.startswith("ssh-") else pyrage.x25519
    if len(recipient) <= _MAX_RECIPIENT_CHARACTERS:
        try:
            return kind.Recipient.from_str(recipient.strip())
        except (pyrage.RecipientError, ValueError):
            pass
    # Not quoted, because the text may be a secret key sent by mistake.
    raise ValueError(f"recipient {number} is not a public key of age (age1...) or SSH (ssh-ed25519, ssh-rsa)")
