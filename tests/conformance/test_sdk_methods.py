"""Every public method of the SDK's clients is in docs/compatibility.md, with a test that calls it."""

from __future__ import annotations

import importlib
import re

import pytest
import tinker
from conformance import sdk_methods


def test_the_table_has_every_public_method() -> None:
    """conftest.py checks that the tests in the table call them, as they run."""
    clients = {getattr(tinker, name) for name in dir(tinker) if re.fullmatch(r"[A-Z]\w+Client", name)}
    assert set(sdk_methods.CLIENTS) == clients
    documented = sdk_methods.documented()
    assert list(documented) == sdk_methods.every(), "make methods"
    assert f"{len(documented)} of {len(documented)} methods are served." in sdk_methods.DOCUMENT.read_text()
    for test in set(documented.values()):
        file, _, function = test.partition("::")
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        assert callable(getattr(module, function)), test


def test_a_test_that_does_not_call_what_the_table_says_fails() -> None:
    with pytest.raises(
        AssertionError, match=r"test_service_client calls .*'ServiceClient.close'.*: make methods"
    ):
        sdk_methods.check("conformance/test_sdk_clients.py::test_service_client")
    sdk_methods.check("conformance/test_sdk_methods.py::of_no_table")
