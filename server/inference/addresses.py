"""Which machines this server may ask anything: what a client names could be anybody's."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def host_and_port(url: str) -> tuple[str, int]:
    """Raises ValueError for what is no http(s) URL of a server."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
        raise ValueError(f"{url!r} is no URL of a server: write http://HOST:PORT")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(f"the URL of {parts.hostname!r} is more than http://HOST:PORT; keys are given apart")
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    found = address(host)
    return host == "localhost" if found is None else found.is_loopback


def url_of(host: str, port: int) -> str:
    found = address(host)
    bracketed = f"[{found}]" if isinstance(found, ipaddress.IPv6Address) else host
    return f"http://{bracketed}:{port}"


class Allowed:
    """What the operator serves with, and what else the operator allows: `HOST`, `HOST:PORT` or a network like
    `10.0.0.0/8`; and this machine, if only its own users can ask us (`loopback`). A name is compared as it is
    written; it is resolved by nobody here, so one that is allowed is its resolver's to mean."""

    def __init__(self, served: Iterable[str], allowed: Iterable[str], loopback: bool):
        """Raises ValueError."""
        self._loopback = loopback
        self._places = {host_and_port(url) for url in served}
        self._hosts: set[str] = set()
        self._networks: list[Network] = []
        for entry in allowed:
            if "/" in entry:
                self._networks.append(ipaddress.ip_network(entry))
            elif (found := address(entry)) is not None:
                self._hosts.add(str(found))
            elif ":" in entry:
                self._places.add(host_and_port(f"http://{entry}"))
            else:
                self._hosts.add(entry.lower())

    def __contains__(self, place: tuple[str, int]) -> bool:
        host, port = place[0].lower(), place[1]
        found = address(host)
        plain = host if found is None else str(found)
        if (self._loopback and is_loopback(host)) or plain in self._hosts or (plain, port) in self._places:
            return True
        return found is not None and any(found in network for network in self._networks)
