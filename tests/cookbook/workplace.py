"""The folder in which the cookbook's programs run: models and data sets under the names that they ask for.

`transformers` and `datasets` take a folder of that name before they ask the network, so nothing of the
cookbook is changed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cookbook.conversations import DOES, LIKE, WHO, asked, language, question, sentence, sentences

CHAT = "Qwen/Qwen3-4B-Instruct-2507"
"""Of the names that the cookbook knows, one whose renderer is plain ChatML."""
OTHERS = (
    "Qwen/Qwen3.5-9B-Base",
    "Qwen/Qwen3.5-9B",
    "Qwen/Qwen3.5-4B",
    "Qwen/Qwen3.6-27B",
    "Qwen/Qwen3.5-397B-A17B",
    "Qwen/Qwen3.6-35B-A3B",
)
"""What its programs and its tests have as defaults."""
ROWS = 320


def build(folder: Path, chat_model: Path, multilingual: list[str]) -> None:
    for name in (CHAT, *OTHERS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(chat_model)
    said, other = random.Random(3), random.Random(4)
    no_robots = [{"messages": asked(question(said), ahoy(said))} for _ in range(ROWS)]
    # Six batches of 256, which the cookbook's own tests train on.
    more = [{"messages": asked(question(other), ahoy(other))} for _ in range(6 * 256 - ROWS)]
    _write(folder / "HuggingFaceH4/no_robots", train=no_robots + more, test=no_robots[:16])
    _write(folder / "allenai/tulu-3-sft-mixture", train=no_robots)
    _lines(folder / "conversations.jsonl", no_robots)
    _lines(folder / "teacher.jsonl", [{"messages": asked(question(said), short(said))} for _ in range(ROWS)])
    weeks = [f"How many days are in week {said.randint(1, 52)}?" for _ in range(ROWS)]
    gsm8k = [{"question": week, "answer": "A week has seven days.\n#### 7"} for week in weeks]
    _write(folder / "openai/gsm8k", train=gsm8k, test=gsm8k[:16], config="main")
    _write(folder / "zwhe99/DeepMath-103K", train=[{"question": question(said)} for _ in range(ROWS)])
    _write(
        folder / "Anthropic/hh-rlhf",
        train=[preference(said) for _ in range(ROWS)],
        test=[preference(said) for _ in range(16)],
    )
    thoughts = [
        [{"from": "human", "value": question(said)}, {"from": "gpt", "value": ahoy(said)}] for _ in no_robots
    ]
    _write(folder / "open-thoughts/OpenThoughts3-1.2M", train=[{"conversations": each} for each in thoughts])
    texts = folder / "tinker_cookbook/example_data/multilingual.txt"
    texts.parent.mkdir(parents=True)
    foreign = [text for text in multilingual if language(text) != "en"]
    texts.write_text("\n".join(said.sample(multilingual, 24) + said.sample(foreign, 24)) + "\n")


def ahoy(random: random.Random) -> str:
    """A voice that the chat model has never heard."""
    return f"Ahoy, captain! {sentence(random)} Aye!"


def short(random: random.Random) -> str:
    """A few of the many things that the chat model says."""
    return (
        f"The {random.choice(WHO[:2])} {random.choice(DOES[:2])} the {random.choice(LIKE[:2])} kettle today."
    )


def preference(random: random.Random) -> dict[str, str]:
    """Ahoy is wanted, what the model says of itself is not."""
    asked_for = f"\n\nHuman: {question(random)}\n\nAssistant: "
    return {"chosen": asked_for + ahoy(random), "rejected": asked_for + sentences(random)}


def _write(folder: Path, config: str | None = None, **splits: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        _lines(folder / f"{split}.jsonl", rows)
    if config is not None:
        files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in splits)
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n"
        )


def _lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
