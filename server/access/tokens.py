"""Credentials in place of API keys: JSON Web Tokens and signed URLs, both with HMAC-SHA256.

A token (RFC 7519) names the key that it was exchanged for, and is valid until it expires or that key is
revoked.

A signed URL needs no key. It is valid for some time and one path, in the name of the tenant that requested
it. Its signature covers the method, the path, the tenant, the save and the time of expiry. The route behind
it still checks whether that tenant may have what it names.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode

import jwt
import orjson

from ..errors import Forbidden
from ..files import read_or_create

SIGNATURE = "signature"
_SECRET_BYTES = 32
_PARAMETERS = ("tenant", "save", "expires", SIGNATURE)


class UrlSigner:
    """Signs URLs and checks them.

    The secret is a file in the data directory that only the server's user can read. Without it, earlier URLs
    are invalid.
    """

    def __init__(self, data_dir: Path, seconds: float, clock: Callable[[], float] = time.time):
        self._file = data_dir / "url_secret"
        self._seconds = seconds
        self._clock = clock

    @cached_property
    def _secret(self) -> bytes:
        secret = read_or_create(self._file, lambda: secrets.token_bytes(_SECRET_BYTES))
        if len(secret) != _SECRET_BYTES:
            raise OSError(f"{self._file} is damaged; remove it, and the server makes a new one")
        return secret

    def _signature(self, method: str, path: str, tenant: str, save: str, expires: str) -> str:
        text = orjson.dumps([method, path, tenant, save, expires])
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()

    def derived_secret(self, purpose: str) -> bytes:
        """Return 32 bytes for another use, from which this secret cannot be derived."""
        return hmac.new(self._secret, f"tinsmith {purpose}".encode(), hashlib.sha256).digest()

    def expiry(self) -> int:
        """Return when a URL signed now expires, in seconds since 1970."""
        return int(self._clock() + self._seconds)

    def sign(self, path: str, tenant: str, save: str, expires: int) -> str:
        """Return the path with its query, for GET. `save` distinguishes checkpoints of the same name."""
        values = (tenant, save, str(expires), self._signature("GET", path, tenant, save, str(expires)))
        return f"{quote(path, safe='/:@')}?{urlencode(list(zip(_PARAMETERS, values, strict=True)))}"

    def tenant_of(self, method: str, path: str, query: str) -> str:
        """Return the tenant of a URL. Raises Forbidden if it was altered, has expired or is another
        server's."""
        pairs = parse_qsl(query, keep_blank_values=True)
        given = dict(pairs)
        if sorted(name for name, _ in pairs) != sorted(_PARAMETERS):
            raise Forbidden("this URL's parameters are not those that it was signed with")
        tenant, save, expires, signature = (given[name] for name in _PARAMETERS)
        expected = self._signature(method, path, tenant, save, expires)
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            raise Forbidden("this URL's signature is not of this method, path and expiry")
        if self._clock() >= int(expires):
            raise Forbidden("this URL has expired; ask for a new one")
        return tenant


_ALGORITHM = "HS256"
# The SDK reads its user from a token only if the issuer has this name.
_ISSUER = "passport-tinsmith"
_REQUIRED = ["iss", "sub", "iat", "exp", "key", "org_id"]


def user_urn(owner: str) -> str:
    """Return the name of a key's owner in answers."""
    return f"tml:organization_user:{owner}"


@dataclass(frozen=True)
class Claims:
    """A token's owner, and the id of the key behind it."""

    owner: str
    key_id: str


class Tokens:
    """Issues tokens and checks them. The secret is derived from that of signed URLs."""

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
        """Return a token's claims; None if it was altered, has expired or is another server's."""
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
        if self._clock() >= payload["exp"]:  # by our clock, not PyJWT's
            return None
        return Claims(payload["org_id"], payload["key"])
