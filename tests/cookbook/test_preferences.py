"""Direct preference optimisation, whose loss is the client's: it differentiates it by log-probs of ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import mean

import pytest
from cookbook.programs import Cookbook
from cookbook.workplace import CHAT

pytestmark = pytest.mark.slow


def test_dpo(cookbook: Cookbook, seen: Callable[[str, str], None]) -> None:
    flags = (f"model_name={CHAT}", "dataset=hhh", "learning_rate=1e-3", "batch_size=16", "max_steps=10")
    run = cookbook.recipe("preference.dpo.train", "dpo", *flags, "max_length=512")
    loss, accuracy, margin = (run.column(name) for name in ("dpo_loss", "accuracy", "margin"))
    seen(
        "`preference.dpo`",
        f"loss {loss[0]:.4f} (ln 2 is {math.log(2):.4f}) to {loss[-1]:.3f}, "
        f"accuracy {mean(accuracy[-2:]):.2f}, margin {margin[-1]:.2f} in {len(loss)} steps",
    )
    assert loss[0] == pytest.approx(math.log(2), abs=2e-3), "the reference scores as the trainer does"
    assert abs(margin[0]) < 4e-3
    assert mean(accuracy[-2:]) > 0.9
    assert margin[-1] > 0.3
    assert loss[-1] < 0.6
