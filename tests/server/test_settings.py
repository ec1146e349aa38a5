"""What an operator says, and what the command answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from tinsmith.server.access.auth import ApiKeys
from tinsmith.server.cli import app
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


def test_keys_and_owners() -> None:
    keys = ApiKeys(["alice=tml-one", "alice=tml-two", "tml-three=", "bob=tml-four"])

    def owner_of(key: str | None) -> str | None:
        found = keys.find(key)
        return None if found is None else found.owner

    assert owner_of("tml-one") == owner_of("tml-two") == "alice"
    assert owner_of("tml-four") == "bob"
    unnamed = owner_of("tml-three=")
    assert unnamed is not None
    assert "three" not in unnamed
    assert [owner_of(key) for key in ("tml-on", "tml-one ", "", None, "alice", "alice=tml-one")] == [None] * 6
    assert ApiKeys([]).find(None).owner == "local"


def test_serve_says_what_is_missing(tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert "--model" in run(app, ["serve"]).output
    refused = run(app, ["serve", "--model", "x", "--host", "0.0.0.0"])
    assert refused.exit_code == 2
    assert "API key" in refused.output
    unknown = run(app, ["serve", "--model", str(tmp_path / "nothing")])
    assert unknown.exit_code == 2
    assert "neither a folder" in unknown.output
    assert "config.json" in run(app, ["serve", "--model", f"x={tmp_path}"]).output
    assert run(app, ["version"]).output.strip()
    assert "smollm2-135m" in run(app, ["models", "list"]).output
    assert "tinsmith serve --model" in run(app, ["serve", "--help"]).output


def test_the_server_imports_no_array_library() -> None:
    code = (
        "import sys, tinsmith.server.cli, tinsmith.server.serve, tinsmith.server.app;"
        "print([m for m in ('jax', 'jaxlib', 'flax', 'optax', 'orbax', 'torch', 'transformers')"
        " if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
