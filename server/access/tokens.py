"""Short-lived tokens in place of API keys: JSON Web Tokens (RFC 7519), signed with HMAC-SHA256.

A token names the key that it was exchanged for, and is good as long as that one is, until it expires.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import jwt

from .signed_urls import UrlSigner

_ALGORITHM = "HS256"
# The SDK reads who it is from a token that it was given only if its issuer is called so.
_ISSUER = "passport-tinsmith"
_REQUIRED = ["iss", "sub", "iat", "exp", "key", "org_id"]


def user_urn(owner: str) -> str:
    """How answers name the owner of a key."""
    return f"tml:organization_user:{owner}"


@dataclass(frozen=True)
class Claims:
    """Whose token it is, and the id of the key behind it."""

    owner: str
    key_id: str


class Tokens:
    """Their secret is derived from that of signed URLs: without its file, all tokens are void."""

    def __init__(self, signer: UrlSigner, seconds: float, clock: Callable[[], float] = time.time):
        self._signer = signer
        self._seconds = seconds
        self._clock = clock

    @cached_property
    def _secret(self) -> bytes:
        return self._signer.derived_secret("tokens")

    def issue(self, claims: Claims) -> str:
        now = int(self._clock())
        payload = {
            "iss": _ISSUER,
            "sub": user_urn(claims.owner),
            "org_id": claims.owner,
            "key": claims.key_id,
            "iat": now,
            "exp": now + int(self._seconds),
        }
        return jwt.encode(payload, self._secret, _ALGORITHM)

    def claims(self, token: str) -> Claims | None:
        """None for one that was altered, is of another server or has expired."""
        try:
            payload = jwt.decode(
                token,
                self._secret,
                algorithms=[_ALGORITHM],
                issuer=_ISSUER,
                options={"require": _REQUIRED, "verify_exp": False, "verify_iat": False},
            )
        except jwt.InvalidTokenError:
            return None
        if self._clock() >= payload["exp"]:  # by this clock, not by PyJWT's
            return None
        return Claims(payload["org_id"], payload["key"])
