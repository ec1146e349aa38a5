"""Short-lived tokens in place of API keys: JSON Web Tokens (RFC 7519), signed with HMAC-SHA256.

A token names the key that it was exchanged for, and is good as long as that one is, until it expires.

URLs that need no key: for some time, for one path, in the name of the tenant that asked for them.

A signature is an HMAC-SHA256 over the method, the path, the tenant, the save and the time of expiry. It says
who is asking, as a key does; the route behind it still looks whether that tenant may have what it names.
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
    """Its secret is a file in the data directory that only the server's user can read; without it, all URLs
    that were given out are void."""

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
        """32 bytes for another use, from which nobody finds this one's secret."""
        return hmac.new(self._secret, f"tinsmith {purpose}".encode(), hashlib.sha256).digest()

    def expiry(self) -> int:
        """Of a URL that is signed now, in seconds since 1970."""
        return int(self._clock() + self._seconds)

    def sign(self, path: str, tenant: str, save: str, expires: int) -> str:
        """The path with its query, for GET. `save` tells two checkpoints of the same name apart."""
        values = (tenant, save, str(expires), self._signature("GET", path, tenant, save, str(expires)))
        return f"{quote(path, safe='/:@')}?{urlencode(list(zip(_PARAMETERS, values, strict=True)))}"

    def tenant_of(self, method: str, path: str, query: str) -> str:
        """Whose URL it is. Raises Forbidden for one that was altered, is of another server or has expired."""
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
