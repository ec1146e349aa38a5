"""Settings, and the command's answers to wrong ones."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import timeit
from pathlib import Path

import pytest
from pydantic import ValidationError
from tinsmith.server.access import ApiKeys
from tinsmith.server.cli import app
from tinsmith.server.ledger.accounts import digest
from tinsmith.server.settings import Settings
from typer.testing import CliRunner


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_no_keys_no_network(host: str) -> None:
    with pytest.raises(ValidationError, match="--api-key"):
        Settings(host=host)
    assert Settings(host=host, api_key=["tml-a"]).api_keys == ["tml-a"]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert Settings(host=host).api_keys == []


def test_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nalice=tml-a\n\ntml-b\n")
    monkeypatch.setenv("TINSMITH_MODEL", "a=/x, b=/y")
    monkeypatch.setenv("TINSMITH_MESH", "data=2,fsdp=4")
    monkeypatch.setenv("TINSMITH_API_KEY_FILE", str(keys))
    settings = Settings(port=9)
    assert settings.model == ["a=/x", "b=/y"]
    assert settings.mesh == {"data": 2, "fsdp": 4}
    assert settings.api_keys == ["alice=tml-a", "tml-b"]
    monkeypatch.setenv("TINSMITH_MESH", "pipeline=2")
    with pytest.raises(ValidationError, match="pipeline"):
        Settings()


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_a_postgresql_ledger_by_any_of_its_schemes(scheme: str) -> None:
    pytest.importorskip("psycopg")
    settings = Settings(database_url=f"{scheme}://me:secret@db/tinsmith")
    assert settings.ledger_url == "postgresql+psycopg://me:secret@db/tinsmith"


@pytest.mark.skipif(importlib.util.find_spec("psycopg") is not None, reason="the driver is installed")
def test_the_driver_that_a_postgresql_ledger_needs_is_named() -> None:
    with pytest.raises(ValidationError, match="the package psycopg is missing"):
        Settings(database_url="postgresql://me:secret@db/tinsmith")


def test_keys_and_tenants() -> None:
    keys = ApiKeys(["alice=tml-one", "alice=tml-two", "tml-three=", "bob=tml-four"])

    def owner_of(key: str) -> str | None:
        found = keys.callers.get(digest(key))
        return None if found is None else found.owner

    assert owner_of("tml-one") == owner_of("tml-two") == "alice"
    assert owner_of("tml-four") == "bob"
    unnamed = owner_of("tml-three=")
    assert unnamed is not None
    assert "three" not in unnamed
    assert [owner_of(key) for key in ("tml-on", "tml-one ", "", "alice", "alice=tml-one")] == [None] * 5
    assert not ApiKeys([]).required


def test_serve_says_what_is_missing(tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert "--model" in run(app, ["serve"]).output
    place = ["--port", "0", "--data-dir", str(tmp_path / "data")]
    refused = run(app, ["serve", "--model", "x", "--host", "0.0.0.0", *place])
    assert refused.exit_code == 2
    assert "API key" in refused.output
    unknown = run(app, ["serve", "--model", str(tmp_path / "nothing"), *place])
    assert unknown.exit_code == 2
    assert "no such folder" in unknown.output
    assert "config.json" in run(app, ["serve", "--model", f"x={tmp_path}", *place]).output
    assert run(app, ["version"]).output.strip()
    assert "smollm2-135m" in run(app, ["models", "list"]).output
    assert "tinsmith serve --model" in run(app, ["serve", "--help"]).output


def test_the_server_imports_no_array_library() -> None:
    code = (
        "import sys, tinsmith.server.cli, tinsmith.server.cli.serve, tinsmith.server.app;"
        "print([m for m in ('jax', 'jaxlib', 'flax', 'optax', 'orbax', 'torch', 'transformers')"
        " if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


NO_KEYS = {
    "": "is empty",
    " ": "is empty",
    "alice=": "of alice) is empty",
    "alice= ": "of alice) is empty",
    "tml-": "is empty",
    "alice=tml-": "is empty",
    "secret": "begin with tml-",
    "alice=secret": "begin with tml-",
    "eyJhbGciOiJIUzI1NiJ9.e30.x": "begin with tml-",  # the SDK would take it for a token
    "TML-secret": "begin with tml-",
    "=tml-secret": "tenant's name",
    "a/b=tml-secret": "tenant's name",
    "alice =tml-secret": "tenant's name",
    "tml-two words": "no spaces",
    "tml-sécret": "ASCII",
    "tml-a\tb": "ASCII",
    "tml-" + "a" * 512: "512",
}


@pytest.mark.parametrize("entry", NO_KEYS)
def test_a_key_that_no_client_could_send_is_refused_at_the_start(entry: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=re.escape(NO_KEYS[entry])) as refused:
        Settings(api_key=["bob=tml-fine", entry])
    assert "secret" not in str(refused.value.errors()[0]["msg"])
    started = CliRunner().invoke(app, ["serve", "--model", str(tmp_path), "--api-key", entry])
    assert started.exit_code == 2
    assert NO_KEYS[entry] in started.output
    assert len(started.output.splitlines()) == 1
    if entry.strip() and "\t" not in entry:
        (tmp_path / "keys").write_text(f"# ours\n\n   \ntml-fine\n{entry}\n")
        with pytest.raises(ValidationError, match=re.escape(NO_KEYS[entry])):
            Settings(api_key_file=tmp_path / "keys")


@pytest.mark.parametrize("value", ["", " ", ",", " , "])
def test_an_empty_list_of_keys_does_not_open_the_server(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TINSMITH_API_KEY", value)
    with pytest.raises(ValidationError, match="no key in it"):
        Settings()


@pytest.mark.parametrize("text", ["", "\n\n", "# tml-a\n", "\ufeff\n"])
def test_a_file_without_keys_does_not_open_the_server(text: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ValidationError, match="no key in it"):
        Settings(api_key_file=file)


def test_two_tenants_cannot_share_a_key() -> None:
    with pytest.raises(ValidationError, match="alice and bob have the same key"):
        Settings(api_key=["alice=tml-a", "bob=tml-a"])
    assert len(ApiKeys(["alice=tml-a", "alice=tml-a"]).tenants) == 1


def test_looking_up_a_key_takes_the_same_time_however_many_there_are() -> None:
    few, many = (ApiKeys([f"tml-{number}" for number in range(count)]) for count in (1, 50_000))

    def seconds(keys: ApiKeys) -> float:
        found = keys.callers
        look_up = lambda: (found.get(digest("tml-0")), found.get(digest("tml-x")))  # noqa: E731
        return min(timeit.repeat(look_up, number=100, repeat=5))

    assert seconds(many) < 10 * seconds(few)


@pytest.mark.parametrize(
    "url", ["example.org", "//example.org", "ftp://x", "https://", "http://x:y", "http://x?a=b", ""]
)
def test_a_public_url_is_one_that_download_urls_can_begin_with(url: str) -> None:
    with pytest.raises(ValidationError, match="write https://HOST"):
        Settings(public_url=url)
    for right in ("https://example.org", "http://10.0.0.1:8000", "https://x.org/tinsmith/"):
        assert Settings(public_url=right).public_url == right
