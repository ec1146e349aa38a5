"""URLs that need no key: for some time, for one path, in the name of the tenant that asked for them.

A signature is an HMAC-SHA256 over the method, the path, the tenant, the save and the time of expiry. It says
who is asking, as a key does; the route behind it still looks whether that tenant may have what it names.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode

import orjson

from ..errors import Forbidden
from ..private_files import read_or_create

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
