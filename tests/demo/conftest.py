"""The demo's model is a real one: its programs are worth compiling well."""

import pytest


@pytest.fixture(autouse=True)
def _default_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
