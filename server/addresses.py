"""Addresses that this server may connect to: a client could name anybody's machine.

Only what the operator names is allowed. Loopback, link-local (where clouds keep metadata and credentials),
multicast and unspecified addresses are never part of a wider network: `0.0.0.0/0` allows the public and
private ones only.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_RESOLVING_SECONDS = 5.0


def host_and_port(url: str) -> tuple[str, int]:
    """Split a server's URL. Raises ValueError if it is not http(s)://HOST:PORT."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
        raise ValueError(f"{url!r} is not the URL of a server; write http://HOST:PORT")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            f"the URL of {parts.hostname!r} has more than http://HOST:PORT; keys are given separately"
        )
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def address(host: str) -> Address | None:
    """Return the IP address that `host` is, with IPv4 written as IPv6 as IPv4; None for a name."""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return None
    return _plain(found)


def _plain(found: Address) -> Address:
    """Return the IPv4 address that an IPv6 one stands for (`::ffff:a.b.c.d`, 6to4, Teredo, NAT64), or
    `found`."""
    if isinstance(found, ipaddress.IPv4Address):
        return found
    if found.ipv4_mapped is not None:
        return found.ipv4_mapped
    if found.sixtofour is not None:
        return found.sixtofour
    if found.teredo is not None:
        return found.teredo[1]
    is_embedded = found in _NAT64 or (int(found) >> 32 == 0 and int(found) > 1)
    return ipaddress.IPv4Address(int(found) & 0xFFFFFFFF) if is_embedded else found


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_loopback(host: str) -> bool:
    found = address(host)
    return host.lower() == "localhost" if found is None else found.is_loopback


def url_of(host: str, port: int) -> str:
    found = address(host)
    plain = host if found is None else f"[{found}]" if found.version == 6 else str(found)
    return f"http://{plain}:{port}"


def _is_special(found: Address | Network) -> bool:
    """Return whether only an entry for exactly such addresses allows it."""
    return found.is_loopback or found.is_link_local or found.is_multicast or found.is_unspecified


class NotAllowed(Exception):
    """The host has no allowed address. The message does not say which addresses it has."""


class Allowed:
    """The allowed addresses: the SGLang servers of the settings, and `HOST`, `HOST:PORT` or networks such as
    `10.0.0.0/8`.

    A name is allowed as it is written, and may lead to any address but a link-local, multicast or unspecified
    one. A name that is not allowed is never resolved.
    """

    def __init__(self, served: Iterable[str], allowed: Iterable[str]):
        """Parse the entries. Raises ValueError."""
        self._places: set[tuple[str, int]] = set()
        self._hosts: set[str] = set()
        self._networks: list[Network] = []
        for url in served:
            self._allow_place(*host_and_port(url))
        for entry in allowed:
            if "/" in entry:
                self._networks.append(ipaddress.ip_network(entry))
            elif ":" in entry and address(entry) is None:
                self._allow_place(*host_and_port(f"http://{entry}"))
            else:
                self._hosts.update(_names(entry))
        # Separate threads, because looking up a name may take long.
        self._resolvers = ThreadPoolExecutor(4, "resolver")

    def _allow_place(self, host: str, port: int) -> None:
        self._places.update((name, port) for name in _names(host))

    def __contains__(self, place: tuple[str, int]) -> bool:
        """Return whether the host is named, or is an address in an allowed network."""
        host, port = plain_host(place[0]), place[1]
        if host in self._hosts or (host, port) in self._places:
            return True
        found = address(host)
        if found is None:
            return host == _LOCALHOST and any((name, port) in self for name in _LOOPBACK)
        return any(_covers(network, found) for network in self._networks)

    async def resolve(self, host: str, port: int) -> list[str]:
        """Return the addresses to connect to, the best first. Raises NotAllowed, and OSError for an unknown
        name.

        Connect to one of these, not to the name, which may lead elsewhere a moment later.
        """
        if (host, port) not in self:
            raise NotAllowed(f"{host}:{port} is not allowed")
        literal = address(host)
        if literal is not None:
            return [str(literal)]
        found = [str(each) for each in await self._addresses(host, port) if self._may_be_led_to(each, port)]
        if not found:
            raise NotAllowed(f"{host}:{port} leads to an address that is not allowed")
        return list(dict.fromkeys(found))

    def _may_be_led_to(self, found: Address, port: int) -> bool:
        is_network_s_own = found.is_link_local or found.is_multicast or found.is_unspecified
        return not is_network_s_own or (str(found), port) in self

    async def _addresses(self, host: str, port: int) -> list[Address]:
        def look_up() -> list[Address]:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            # What follows a % is the interface of a link-local address.
            return [_plain(ipaddress.ip_address(str(each[4][0]).partition("%")[0])) for each in found]

        looking = asyncio.get_running_loop().run_in_executor(self._resolvers, look_up)
        return await asyncio.wait_for(looking, _RESOLVING_SECONDS)

    def close(self) -> None:
        self._resolvers.shutdown(wait=False, cancel_futures=True)


_LOCALHOST = "localhost"
_LOOPBACK = ("127.0.0.1", "::1")


def _names(host: str) -> tuple[str, ...]:
    """Return the host as places are compared; `localhost` includes the loopback addresses."""
    plain = plain_host(host)
    return (plain, *_LOOPBACK) if plain == _LOCALHOST else (plain,)


def plain_host(host: str) -> str:
    """Return the host as hosts are compared: an address in its usual form, a name in lower case."""
    found = address(host)
    return host.lower().rstrip(".") if found is None else str(found)


def _covers(network: Network, found: Address) -> bool:
    return found in network and (_is_special(network) or not _is_special(found))
