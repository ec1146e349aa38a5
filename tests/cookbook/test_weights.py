"""Weights leave the server as the cookbook's tools want them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cookbook.programs import Cookbook
from cookbook.workplace import CHAT

pytestmark = pytest.mark.slow


def test_downloads_load_with_equal_log_probs(
    cookbook: Cookbook, chat_model: Path, seen: Callable[[str, str], None]
) -> None:
    program = Path(__file__).with_name("weights_lifecycle.py")
    output = cookbook.execute("weights", program, CHAT, chat_model, cookbook.folder / "weights")
    found = json.loads(output.splitlines()[-1])
    seen(
        "`weights.download`, `build_hf_model`, `build_lora_adapter`",
        "differences of log-probs from the sampler's: "
        + ", ".join(f"{name} {found[name]:.0e}" for name in ("merged", "sharded", "adapter")),
    )
    assert found["learnt"] > 0.1
    assert found["tensors"] > 0
    assert found["exports_differ"] == 0, "the encrypted, temporary export is the plain one"
    for name in ("merged", "sharded", "adapter"):
        assert found[name] < 1e-4, name
