"""Supervised recipes: losses fall, and a program that was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tinker
from cookbook.programs import Cookbook, Run
from cookbook.workplace import CHAT

pytestmark = pytest.mark.slow
LEARNS = (f"model_name={CHAT}", "lora_rank=8", "learning_rate=5e-3", "batch_size=16")


def nll(run: Run) -> dict[int, float]:
    """Return the NLL by step; of a step that was done twice, the later one."""
    return {row["step"]: row["train_mean_nll"] for row in run.metrics if "train_mean_nll" in row}


def test_sl_loop_killed_and_resumed(cookbook: Cookbook, seen: Callable[[str, str], None]) -> None:
    flags = (*LEARNS, "max_steps=10", "save_every=5")
    run = cookbook.kill_after(8, "sl_loop", "sl_loop", *flags)
    before, (saved,) = nll(run), run.checkpoints
    cookbook.recipe("sl_loop", "sl_loop", *flags)
    after = nll(run)
    again = [step for step in before if step >= saved["batch"]]
    gap = max(abs(before[step] - after[step]) for step in again)
    seen(
        "`sl_loop`, killed, resumed",
        f"NLL {after[0]:.2f} to {after[9]:.2f} in 10 steps; {len(again)} done twice, differing by {gap:.0e}",
    )
    assert list(after) == list(range(10))
    assert len(again) >= 2
    assert gap < 1e-4, "weights and optimizer are those of the step that it resumed from"
    assert after[9] < 0.5 * after[0]
    assert [checkpoint["name"] for checkpoint in run.checkpoints] == ["000005", "000005", "final"]
    assert run.checkpoints[-1]["sampler_path"].startswith("tinker://")


def test_chat_sl_killed_and_resumed(cookbook: Cookbook, seen: Callable[[str, str], None]) -> None:
    """It submits a step ahead, so that a checkpoint has learnt from batches which are trained on again."""
    flags = (
        *LEARNS,
        f"dataset={cookbook.folder / 'conversations.jsonl'}",
        *("lr_schedule=constant", "max_steps=16", "save_every=6", "rolling_save_every=2", "eval_every=0"),
        "behavior_if_log_dir_exists=resume",
    )
    run = cookbook.kill_after(9, "chat_sl.train", "chat_sl", *flags)
    before, resumed = nll(run), run.checkpoints[-1]["batch"]
    cookbook.recipe("chat_sl.train", "chat_sl", *flags)
    after = nll(run)
    seen(
        "`chat_sl.train`, killed, resumed",
        f"NLL {before[0]:.2f} to {after[15]:.2f} (x {after[15] / before[0]:.2f}) in 16 steps; step {resumed} "
        f"{before[resumed]:.2f} before the kill, {after[resumed]:.2f} after it",
    )
    assert sorted(after) == list(range(16))
    assert after[resumed] < before[resumed] + 0.05, "no gap"
    assert after[15] < 0.6 * before[0]

    rolling = [checkpoint for checkpoint in run.checkpoints if checkpoint.get("rolling")]
    assert rolling
    run_ids = {checkpoint["state_path"].split("/")[2] for checkpoint in run.checkpoints}
    rest = tinker.RestClient(base_url=cookbook.environment["TINKER_BASE_URL"], api_key="tml-cookbook")
    kept = {c.tinker_path for run_id in run_ids for c in rest.list_checkpoints(run_id).result().checkpoints}
    left = [checkpoint for checkpoint in rolling if checkpoint["state_path"] in kept]
    assert len(left) <= len(run_ids), "each rolling checkpoint deletes the one before"
    periodic = [checkpoint for checkpoint in run.checkpoints if not checkpoint.get("rolling")]
    assert {checkpoint["state_path"] for checkpoint in periodic} <= kept


def test_prompt_distillation(cookbook: Cookbook, seen: Callable[[str, str], None]) -> None:
    """The teacher is told in a long prompt what the student then does without one."""
    data = Path(cookbook.folder) / "prompt_distillation.jsonl"
    recipes = "tinker_cookbook.recipes.prompt_distillation"
    cookbook.execute("create_data", "-m", f"{recipes}.create_data", f"output_file={data}")
    answered = len(data.read_text().splitlines())
    flags = (*LEARNS, f"file_path={data}", "num_epochs=5", "eval_every=0")
    run = cookbook.recipe("prompt_distillation.train", "prompt_distillation", *flags)
    found = run.column("train_mean_nll")
    seen("`prompt_distillation`", f"{answered} of 48 texts labelled; NLL {found[0]:.2f} to {found[-1]:.2f}")
    assert answered > 24
    assert found[-1] < 0.6 * found[0]


def test_off_policy_reasoning(cookbook: Cookbook, seen: Callable[[str, str], None]) -> None:
    sizes = ("max_prompts=160", "buffer_size=160", "max_steps=10")
    run = cookbook.recipe("distillation.off_policy_reasoning", "off_policy_reasoning", *LEARNS, *sizes)
    found = run.column("train_mean_nll")
    seen(
        "`distillation.off_policy_reasoning`",
        f"NLL {found[0]:.2f} to {found[-1]:.2f} in {len(found)} steps",
    )
    assert found[-1] < 0.6 * found[0]
