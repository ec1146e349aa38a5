"""The README.md of exported weights: a model card, whose head the Hugging Face hub reads.

The keys are those of https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
from pathlib import Path

FILE = "README.md"

_ADAPTER = """# {title}

A LoRA adapter of rank {rank} (alpha {alpha:g}) for {base}, trained with Tinsmith.

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("PATH")  # this folder
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
"""
_MODEL = """# {title}

A model with all weights, trained with Tinsmith from {base}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")  # this folder
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
"""


def of_adapter(base_model: str, rank: int, alpha: float) -> str:
    """Return the card of a LoRA adapter. `base_model`: a folder, or a hub id that may have an `@revision`."""
    head = _head(base_model, "peft", "adapter", ["lora", "transformers"])
    base, name = _shown(base_model)
    return head + _ADAPTER.format(title=f"An adapter for {name}", rank=rank, alpha=alpha, base=base)


def of_model(base_model: str) -> str:
    """Return the card of a complete model, with merged adapters or trained weights."""
    base, name = _shown(base_model)
    head = _head(base_model, "transformers", "finetune", [])
    return head + _MODEL.format(title=f"{name}, fine-tuned", base=base)


def _hub_id(base_model: str) -> str | None:
    is_folder = Path(base_model).is_absolute()
    return base_model.partition("@")[0] if not is_folder and base_model.count("/") == 1 else None


def _shown(base_model: str) -> tuple[str, str]:
    """Return how the base model is referred to in the text, and its short name."""
    if (hub_id := _hub_id(base_model)) is None:
        return f"`{base_model}`", Path(base_model).name
    revision = base_model.partition("@")[2]
    link = f"[{hub_id}](https://huggingface.co/{hub_id})"
    return f"{link} (revision `{revision}`)" if revision else link, hub_id.partition("/")[2]


def _head(base_model: str, library: str, relation: str, tags: list[str]) -> str:
    """Return the card's metadata in YAML. The base model is named if the hub can have it."""
    lines = [f"library_name: {library}", "pipeline_tag: text-generation"]
    if (hub_id := _hub_id(base_model)) is not None:
        lines += [f"base_model: {json.dumps(hub_id)}", f"base_model_relation: {relation}"]
    return "\n".join(["---", *lines, f"tags: {json.dumps(['tinsmith', *tags])}", "---", "", ""])
