"""Whether an adapter's folder is what an SGLang server loads and computes as we do.

SGLang reads q, k and v as one matrix, and gate and up; an adapter of some of them is accepted and ends the
server at its first use. It computes lora_alpha / r whatever else the config says.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from ...safetensors_header import Entry, entries

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
_CHANGES_THE_FUNCTION = (
    *("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"),
    "trainable_token_indices",
)


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def problem(folder: Path, base: dict[str, Entry], max_rank: int | None) -> str | None:
    """Why it cannot be loaded beside the base model with these tensors; None: it can.

    Raises OSError or ValueError for files that are not there, or damaged.
    """
    config = json.loads((folder / CONFIG_FILE).read_text())
    changed = [key for key in _CHANGES_THE_FUNCTION if config.get(key)]
    if changed:
        return f"the adapter uses {', '.join(changed)}, which SGLang does not compute"
    rank = config["r"]
    if max_rank is not None and rank > max_rank:
        return f"the adapter's rank is {rank}, the server was started with --max-lora-rank {max_rank}"
    sides: defaultdict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, entry in entries(folder / TENSORS_FILE).items():
        module, _, side = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        sides[module][side] = entry.shape
    for module, shapes in sides.items():
        matrix = base.get(f"{module}.weight")
        if matrix is None and module == "lm_head":
            matrix = base.get("model.embed_tokens.weight")  # tied
        if matrix is None:
            return f"the adapter has {module}, which the base model has not"
        out, into = matrix.shape
        if shapes != {"lora_A": (rank, into), "lora_B": (out, rank)}:
            return f"the adapter's {module} has shapes {shapes}; the base model's matrix is {matrix.shape}"
    return _torn(set(sides))


def _torn(modules: set[str]) -> str | None:
    layers: defaultdict[str, set[str]] = defaultdict(set)
    for module in modules:
        parent, _, name = module.rpartition(".")
        layers[parent].add(name)
    for parent, names in layers.items():
        for group in _FUSED:
            if names & group and not group <= names:
                return f"the adapter has {sorted(names & group)} of {parent}, but not {sorted(group - names)}"
    return None
