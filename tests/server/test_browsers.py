"""Whatever web pages could make a browser send, a server without keys serves this machine's clients alone."""

from __future__ import annotations

import ipaddress

import pytest
from gates import gate
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.types import Message, Receive, Scope, Send
from tinsmith.server.settings import Settings

JSON = ("Content-Type", "application/json")


def status(
    headers: list[tuple[str, str]],
    method: str = "POST",
    keys: list[str] | None = None,
    allowed: list[str] | None = None,
) -> int:
    """Return the answer's status; 200 if the request came through."""
    sent: list[Message] = []

    async def served(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.lower().encode("latin-1"), value.encode("latin-1", "ignore")) for name, value in headers]
    if keys:
        raw.append((b"x-api-key", keys[0].encode()))
    scope = {
        "type": "http",
        "method": method,
        "path": "/",
        "scheme": "http",
        "headers": raw,
        "query_string": b"",
    }
    running = gate(served, keys or [], allowed or [])(scope, receive, send)
    with pytest.raises(StopIteration):
        running.send(None)  # type: ignore[attr-defined]
    return sent[0]["status"]


names = st.one_of(
    st.text(max_size=30),
    st.from_regex(r"[a-z0-9.:@\[\]/\\%-]{0,30}", fullmatch=True),
    st.ip_addresses().map(lambda ip: f"[{ip}]" if ip.version == 6 else str(ip)),
    st.sampled_from(["localhost", "127.0.0.1", "[::1]", "localhost.", "127.0.0.1.nip.io", "localhost:80:80"]),
)


def is_here(host: str) -> bool:
    """Return whether a host is this machine, read independently: the name or address without its port."""
    name = host.strip()
    if name.startswith("["):
        name = name[1 : name.index("]")] if "]" in name else ""
    else:
        name = name.rpartition("@")[2].partition(":")[0]
    name = name.lower().rstrip(".")
    try:
        found = ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    mapped = getattr(found, "ipv4_mapped", None) or found
    return mapped.is_loopback or found.is_loopback


@given(names)
def test_no_host_but_this_machine_s_is_served(host: str) -> None:
    found = status([("Host", host), JSON])
    assert found in (200, 403)
    assert found == 403 or is_here(host)
    assert status([("Host", host), JSON], keys=["tml-a"]) == 200, "keys are enough"
    assert status([("Host", host), JSON], allowed=["*"]) in (200, 403)


@given(
    names, st.sampled_from(["http://", "https://", "", "null", "chrome-extension://"]), st.integers(0, 70000)
)
def test_no_page_but_our_own_is_served(host: str, scheme: str, port: int) -> None:
    origin = f"{scheme}{host}:{port}"
    found = status([("Host", "localhost:8000"), ("Origin", origin), JSON])
    assert found in (200, 403)
    assert found == 403 or (is_here(host) and (port == 8000 or ":8000" in origin))


@given(st.text(max_size=60))
def test_no_content_type_that_pages_may_send_unasked_is_served(kind: str) -> None:
    found = status(
        [
            ("Host", "localhost"),
            ("Content-Length", "2"),
            ("Content-Type", kind),
            ("Origin", "http://localhost"),
        ]
    )
    essence = kind.encode("latin-1", "ignore").decode("latin-1").partition(";")[0].strip().lower()
    if essence in ("", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded"):
        assert found == 415
    assert found in (200, 415)


def test_two_hosts_or_origins_are_both_looked_at() -> None:
    for first, second in (("localhost", "evil.example"), ("evil.example", "localhost")):
        assert status([("Host", first), ("Host", second), JSON]) == 403
        origins = [("Origin", f"http://{each}") for each in (first, second)]
        assert status([("Host", "localhost"), *origins, JSON]) == 403


def test_hosts_that_an_operator_can_allow() -> None:
    good = ["gpu-1", "*.example.org", "*", "10.0.0.2", "fd00::1"]
    assert Settings(allowed_hosts=",".join(good)).allowed_hosts == good  # type: ignore[arg-type]
    for wrong in ("http://a", "a:80", "a/b", "*.", "**", "a b", "*a"):
        with pytest.raises(ValidationError, match="allowed_hosts"):
            Settings(allowed_hosts=[wrong])
    assert status([("Host", "a.example.org"), JSON], allowed=["*.example.org"]) == 200
    assert status([("Host", "example.org"), JSON], allowed=["*.example.org"]) == 403
    assert status([("Host", "[fd00::1]:80"), JSON], allowed=["fd00::1"]) == 200
    assert Settings(public_url="https://tins.example.org/api").own_hosts == ["tins.example.org"]
    assert Settings(public_url="http://127.0.0.1:9000").own_hosts == []
