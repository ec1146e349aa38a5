"""Shape and dtype annotations of the array rooms are checked at run time in every test."""

import gc
import importlib
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook
from xdist.scheduler import LoadFileScheduling

# Tests run on the CPU unless told otherwise, whatever accelerator the machine has.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the tests' time is compilation, and many tests compile the same tiny models.
CACHE = Path(__file__).parents[1] / ".cache" / "tests" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# A quarter of the time of compiling, and the programs of tests are too small to be slow. XLA refuses to run
# with flags that it does not know.
FLAGS = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)

install_import_hook(["tinsmith.model", "tinsmith.losses"], "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_leave() -> Iterator[None]:
    """Free the programs of a file's tests: two workers that keep them all fill a small machine."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    yield
    if "docs.pages" in sys.modules:
        importlib.import_module("docs.runs").set_up()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Check that a test has run the blocks of the documentation that it is said to run."""
    yield
    if "docs.pages" in sys.modules:
        file = item.path.relative_to(Path(__file__).parent).as_posix()
        importlib.import_module("docs.runs").check(f"{file}::{item.name}")


SGLANG = "tests/sglang/"
LONGEST = (SGLANG, "tests/demo/test_notebooks.py")


class WithOneSglang(LoadFileScheduling):
    """A file's tests in one worker, and in one those of all files that share a real SGLang."""

    def _split_scope(self, nodeid: str) -> str:
        return SGLANG if nodeid.startswith(SGLANG) else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return WithOneSglang(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest pieces first, for the workers to come to an end together."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
