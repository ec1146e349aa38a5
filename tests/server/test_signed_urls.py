"""URLs that need no key, and the archive behind some of them."""

from __future__ import annotations

import io
import stat
import tarfile
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
from tinsmith.server.access import UrlSigner
from tinsmith.server.checkpoints.archive import COMPLETE, Archive
from tinsmith.server.errors import Forbidden

PATH = "/api/v1/training_runs/s:train:0/checkpoints/sampler_weights/a/archive.tar"


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_it_opens_one_path_for_one_tenant_for_its_time(tmp_path: Path) -> None:
    clock = Clock()
    signer = UrlSigner(tmp_path, 60.0, clock)
    url = urlsplit(signer.sign(PATH, "alice", "0f", signer.expiry()))
    assert url.path == PATH
    assert signer.tenant_of("GET", PATH, url.query) == "alice"
    assert UrlSigner(tmp_path, 60.0, clock).tenant_of("GET", PATH, url.query) == "alice", "after a start"
    clock.now += 59
    assert signer.tenant_of("GET", PATH, url.query) == "alice"
    clock.now += 1
    with pytest.raises(Forbidden, match="expired"):
        signer.tenant_of("GET", PATH, url.query)


def test_nothing_in_it_can_be_altered(tmp_path: Path) -> None:
    signer = UrlSigner(tmp_path, 60.0)
    query = urlsplit(signer.sign(PATH, "alice", "0f", signer.expiry())).query
    given = dict(parse_qsl(query))
    altered = [
        ("HEAD", PATH, query),
        ("DELETE", PATH, query),
        ("GET", PATH.replace("/a/", "/b/"), query),
        ("GET", PATH + "/", query),
        ("GET", PATH, query + "&tenant=bob"),
        ("GET", PATH, query + "&x="),
        ("GET", PATH, urlencode({name: given[name] for name in ("tenant", "expires", "signature")})),
        ("GET", PATH, urlencode(given | {"signature": given["signature"][:-1]})),
        ("GET", PATH, urlencode(given | {"signature": ""})),
        ("GET", PATH, urlencode(given | {"signature": "ü"})),
    ]
    for name, other in (("tenant", "bob"), ("save", "1f"), ("expires", str(int(given["expires"]) + 1))):
        altered.append(("GET", PATH, urlencode(given | {name: other})))
    for digit in range(0, 64, 7):
        signature = given["signature"]
        flipped = signature[:digit] + ("0" if signature[digit] != "0" else "1") + signature[digit + 1 :]
        altered.append(("GET", PATH, urlencode(given | {"signature": flipped})))
    for method, path, wrong in altered:
        with pytest.raises(Forbidden):
            signer.tenant_of(method, path, wrong)
    other_server = tmp_path / "other"
    other_server.mkdir()
    with pytest.raises(Forbidden):
        UrlSigner(other_server, 60.0).tenant_of("GET", PATH, query)


def test_the_secret_is_for_the_server_s_user_only(tmp_path: Path) -> None:
    signer = UrlSigner(tmp_path, 60.0)
    signer.sign(PATH, "alice", "0f", 0)
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_bytes(b"")
    with pytest.raises(OSError, match="damaged"):
        UrlSigner(tmp_path, 60.0).sign(PATH, "alice", "0f", 0)


async def read(archive: Archive) -> bytes:
    return b"".join([chunk async for chunk in archive.chunks()])


async def test_an_archive_is_the_tar_of_the_files(tmp_path: Path) -> None:
    directory = tmp_path / "x"
    (directory / "below").mkdir(parents=True)
    contents = {"a.bin": bytes(range(256)) * 5000, "b" * 120: b"1", "below/c": b"", "d": bytes(512)}
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    (directory / "link").symlink_to("/etc/passwd")
    archive = Archive(directory)
    (directory / "a.bin").unlink()  # what was opened is sent to its end
    sent = await read(archive)
    assert len(sent) == archive.length
    with tarfile.open(fileobj=io.BytesIO(sent)) as tar:
        assert tar.getnames() == [*sorted(contents), COMPLETE]
        for name, content in contents.items():
            member = tar.extractfile(name)
            assert member is not None
            assert member.read() == content
    with pytest.raises(FileNotFoundError):
        Archive(tmp_path / "nothing")
