"""Distillation, on the student's own samples and on given texts: it comes nearer to the teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
from cookbook.programs import Cookbook
from cookbook.workplace import CHAT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def teacher(cookbook: Cookbook) -> str:
    """A sampler that says a few of the many things that the chat model says, briefly."""
    flags = (f"model_name={CHAT}", "lora_rank=8", "learning_rate=5e-3", "batch_size=16", "max_steps=12")
    data = f"dataset={cookbook.folder / 'teacher.jsonl'}"
    run = cookbook.recipe("chat_sl.train", "teacher", *flags, data, "eval_every=0", "save_every=0")
    return run.checkpoints[-1]["sampler_path"]


def test_on_policy(cookbook: Cookbook, teacher: str, seen: Callable[[str, str], None]) -> None:
    flags = (
        *(f"model_name={CHAT}", f"teacher_model={CHAT}", f"teacher_checkpoint={teacher}", "dataset=deepmath"),
        *("groups_per_batch=8", "group_size=4", "max_tokens=48", "lora_rank=8", "learning_rate=2e-3"),
        *("max_steps=14", "eval_every=0", "save_every=0"),
    )
    kl = cookbook.recipe("distillation.on_policy_distillation", "on_policy", *flags).column("teacher_kl")
    seen(
        "`distillation.on_policy_distillation`",
        f"KL to the teacher {kl[0]:.2f} to {kl[-1]:.2f} in {len(kl)} steps",
    )
    assert mean(kl[-2:]) < 0.6 * kl[0]


def test_off_policy(cookbook: Cookbook, teacher: str, seen: Callable[[str, str], None]) -> None:
    """The library's own loop: no program of the cookbook has flags for it."""
    program = Path(__file__).with_name("distil_off_policy.py")
    output = cookbook.execute("off_policy", program, CHAT, teacher, cookbook.folder / "conversations.jsonl")
    kl = json.loads(output.splitlines()[-1])
    seen(
        "`distillation.train_off_policy`",
        f"KL from the teacher {kl['before']:.2f} to {kl['after']:.2f} in 10 steps",
    )
    assert kl["after"] < 0.6 * kl["before"]
