"""Reads and writes adapters in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`.

`save_adapter` writes what `peft.PeftModel.from_pretrained` loads, with the true rank (the padding of the
trainer's rank buckets is cut off) and with all target modules listed. `load_adapter` reads it back, and also
reads adapters written by PEFT.

The adapter of the unembedding is PEFT's LoRA on `lm_head`. It bypasses the matrix, so as an adapter it is
correct for models with tied embeddings too. Merging it into such a model (`merge_and_unload`) would also
change the input embedding, unless the two are untied first.

Axes: L layers, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..model.config import ModelConfig, Site, Stack
from ..model.families import FAMILIES, adapter_module, is_nested, module_name
from ..model.lora import RANK_BUCKETS, Adapter, pad_rank, pair_shapes, pairs, trainable
from . import digests, expert_files, model_card, peft_config
from .atomic import atomic_directory, size_bytes
from .expert_files import ExpertForm
from .fused_files import Fused, fused_modules, separated
from .hf_folder import copy_tokenizer
from .peft_config import AdapterConfig, AdapterError

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."  # PEFT's prefix to the names of the base model's modules
_TEXT, _NESTED_TEXT = _PREFIX + "model.", _PREFIX + "model.language_model."
"""What the names of a decoder's modules begin with, and those of one that is nested (`families.is_nested`).

The hosted service leaves `language_model` out; PEFT and vLLM need it."""
_OTHER_PREFIXES = {"model.language_model.": "model.", "language_model.": "", "backbone.": "model."}
"""What names may begin with after PEFT's prefix, in families that know several, and what they become here."""

_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})

Unchanged = Callable[[str], np.ndarray]
"""Maps our dotted name of a parameter of the base model to its array."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter read from disk, in host memory, with its rank padded with zeros.

    {"layers": {name: {"a": [L, in, R], "b": [L, R, out]}}, "unembed": {"a": [D, R], "b": [R, V]}}. Its scale
    is alpha / rank."""

    adapter: Adapter
    rank: int
    alpha: float
    base_model: str


def save_adapter(
    directory: Path,
    adapter: Adapter,
    config: ModelConfig,
    *,
    rank: int,
    alpha: float,
    base_model: str,
    tokenizer_of: Path | None = None,
    experts: ExpertForm = "shared",
) -> int:
    """Write an adapter (in host or device memory, rank padded or not). The directory appears complete or not
    at all.

    Serving engines need adapters for q, k and v together, and for gate and up together. If only some of them
    have one, the others get one of zeros. The scale is lora_alpha / r, and nothing else in the config changes
    it. `experts` is the form of the adapters of experts (`expert_files`). Raises ValueError if the model has
    no such form.

    `base_model` is where PEFT's readers load the base model from: a folder, or a hub id that may end with
    `@revision`. The tokenizer files of the folder `tokenizer_of` are copied, because
    `AutoPeftModelForCausalLM` looks for them here, and a model card is written. Returns the size in bytes.
    """
    expert_files.require_form(config, experts)
    adapter = _whole(adapter, config)
    tensors: dict[str, np.ndarray] = {}
    targets: set[str] = set()
    parameters: dict[str, int] = {}  # PEFT's `target_parameters`, and the number of sites in each
    stacked: dict[int, dict[str, dict[str, np.ndarray]]] = {}  # by layer and site
    fused = {
        part: each
        for layer in range(config.num_layers if experts != "shared" else 0)
        for each in fused_modules(config, _PREFIX, layer)
        for part in each.parts
    }
    of_parts: dict[Fused, list[dict[str, np.ndarray]]] = {}

    def add(module: str, a: np.ndarray, b: np.ndarray) -> None:
        tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b)

    for place in _places(config):
        if (pair := place.factors(adapter, rank)) is None:
            continue
        if place.layer is not None and place.site.experts and experts == "target_parameters":
            stacked.setdefault(place.layer, {})[place.site.name] = pair
            continue
        if place.module in fused:
            of_parts.setdefault(fused[place.module], []).append(pair)
            continue
        for module, a, b in expert_files.written(place.module, place.site, pair, experts):
            add(module, a.swapaxes(-1, -2), b.swapaxes(-1, -2))
            if expert_files.is_targeted_by_weight(config, place.site, experts):
                parameters[".".join([*module.split(".")[-2:], "weight"])] = 1
            else:
                targets.add(module.rpartition(".")[2])
    several: dict[str, int] = {}  # the sites of modules and parameters that have several
    for module_of, given in of_parts.items():
        a, b = module_of.written(given)
        add(module_of.module, a.T, b.T)
        targets.add(module_of.name)
        several[module_of.name] = len(given)
    for layer, pairs_of in sorted(stacked.items()):
        for wrapper in expert_files.wrappers(config, _PREFIX, layer):
            names = [site.name for site in wrapper.sites]
            if names[0] in pairs_of:
                add(wrapper.module, *wrapper.written([pairs_of[name] for name in names]))
                parameters[wrapper.name] = len(names)
    # A folder may have an @ in its name; a hub id has none.
    is_folder = Path(base_model).is_absolute()
    name, _, revision = (base_model, "", "") if is_folder else base_model.partition("@")
    adapter_config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision or None,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if parameters:
        several |= {name: sites for name, sites in parameters.items() if sites > 1}
        adapter_config["target_parameters"] = sorted(parameters)
    if several:
        adapter_config |= {
            "rank_pattern": {name: sites * rank for name, sites in several.items()},
            "alpha_pattern": {name: sites * alpha for name, sites in several.items()},
        }
    if experts != "shared" and is_nested(config):
        tensors = {name.replace(_TEXT, _NESTED_TEXT, 1): tensor for name, tensor in tensors.items()}
    with atomic_directory(directory) as writing:
        save_file(tensors, writing / ADAPTER_FILE, metadata={"format": "pt"})
        (writing / CONFIG_FILE).write_text(json.dumps(adapter_config, indent=2) + "\n")
        if tokenizer_of is not None:
            copy_tokenizer(tokenizer_of, writing)
            (writing / model_card.FILE).write_text(model_card.of_adapter(base_model, rank, alpha))
        size = size_bytes(writing)
        digests.write(writing)
    return size


def _whole(adapter: Adapter, config: ModelConfig) -> Adapter:
    """Add adapters of zeros where only some of the matrices that engines merge into one have an adapter."""
    whole: Adapter = adapter | {"layers": {}}
    for stack in config.all_stacks:
        given = stack.of(adapter["layers"])
        ranks = {name: pair["a"].shape[-1] for name, pair in given.items()}
        added = {}
        for site in stack.layer.sites:
            merged = {each.name for each in stack.layer.sites if each.merged and each.merged == site.merged}
            rank = next((ranks[name] for name in ranks if name in merged), None)
            if rank is not None and site.name not in given:
                shapes = pair_shapes(stack, site, rank)
                added[site.name] = {side: np.zeros(shape, np.float32) for side, shape in shapes.items()}
        whole["layers"] |= given | added if stack.key is None else {stack.key: given | added}
    return whole


def is_adapter(directory: Path) -> bool:
    return (Path(directory) / CONFIG_FILE).is_file() and (Path(directory) / ADAPTER_FILE).is_file()


def load_adapter(directory: Path, config: ModelConfig, base: Unchanged | None = None) -> SavedAdapter:
    """Read an adapter into host memory, its rank padded with zeros to its bucket (`lora.pad_rank`).

    A layer without an adapter for a module gets zeros. Modules may have different ranks and scales
    (`rank_pattern`, `alpha_pattern`): a smaller rank is padded with zeros, and a different scale is
    multiplied into B. `base` is needed for a file with copies of the base model's embedding or unembedding,
    which PEFT sometimes adds; they must equal those of the base model.

    Raises FileNotFoundError if there is no adapter, and AdapterError if it is not for this model or is more
    than a plain LoRA (`peft_config`).
    """
    directory = Path(directory)
    if not is_adapter(directory):
        raise FileNotFoundError(f"no PEFT adapter in {directory.name}")
    where = f"PEFT adapter {directory.name}"
    adapter_config = _read_config(directory)
    tensors = _read_tensors(directory)
    if getattr(FAMILIES[config.family], "PREFIXES", ()):  # as PEFT names them, after the files
        for theirs, ours in _OTHER_PREFIXES.items():
            theirs, ours = _PREFIX + theirs, _PREFIX + ours
            tensors = {name.replace(theirs, ours, 1): x for name, x in tensors.items()}
    tensors = {name: x for name, x in tensors.items() if x.size or ".experts.w3." not in name}  # no gate
    wrapped: dict[str, expert_files.Wrapper] = {}
    in_blocks = frozenset(
        fused.module
        for layer in range(config.num_layers)
        for fused in fused_modules(config, _PREFIX, layer)
        if adapter_config.is_in_blocks(fused.module.removeprefix(_PREFIX), len(fused.sites))
    )
    try:
        parts_of = separated(tensors, config, _PREFIX, in_blocks)
        for layer in range(config.num_layers):
            wrapped |= expert_files.unwrapped(tensors, config, _PREFIX, layer)
    except ValueError as error:
        raise AdapterError(f"{where}: {error}") from None
    a_shapes = [tensor.shape for name, tensor in tensors.items() if name.endswith(".lora_A.weight")]
    rank, alpha = adapter_config.overall(shape[-2] for shape in a_shapes if len(shape) > 1)
    if not 1 <= rank <= RANK_BUCKETS[-1]:
        raise AdapterError(f"{where}: a lora_A has rank {rank}; it must be from 1 to {RANK_BUCKETS[-1]}")
    padded_rank = pad_rank(rank)

    adapter: Adapter = {"layers": {}}
    for place in _places(config):
        try:
            module, found = expert_files.read(place.module, place.site, tensors)
        except ValueError as error:
            raise AdapterError(f"{where}: {error}") from None
        wrapper, whole = wrapped.get(module), parts_of.get(module)
        of_base = (module if wrapper is None else wrapper.parameter).removeprefix(_PREFIX)
        shares = 1 if wrapper is None else len(wrapper.sites)
        if whole is not None:
            of_base = whole.module.removeprefix(_PREFIX)
            shares = len(whole.sites) if whole.module in in_blocks else 1
        is_parameter = wrapper is not None
        if not is_parameter and adapter_config.targets_weight_of(of_base):
            of_base, is_parameter = f"{of_base}.weight", True
        true_rank = adapter_config.rank_of(of_base) // shares
        factor = np.float32(adapter_config.scale_of(of_base) / (alpha / rank))
        for side, shape in place.site.factors(true_rank).items():
            tensor = found.get(side)
            if tensor is None:
                continue
            if (field := adapter_config.leaves_out(of_base, is_parameter=is_parameter)) is not None:
                raise AdapterError(
                    f"{where}: {field} leaves out {of_base}, for which there are tensors; PEFT would not "
                    "load them"
                )
            tensor = tensor.swapaxes(-1, -2) if tensor.ndim > 1 else tensor
            if tensor.shape != shape:
                there, wanted = (_of_file(each) for each in (tensor.shape, shape))
                raise AdapterError(
                    f"{where}: {module}.lora_{side.upper()} has shape {there}; expected {wanted}"
                )
            stored = place.new_pair(adapter).setdefault(
                side, np.zeros(place.shapes(padded_rank)[side], np.float32)
            )
            at = (stored if place.at is None else stored[place.at])[tuple(map(slice, shape))]
            with np.errstate(over="ignore"):
                at[...] = tensor if side == "a" or factor == 1 else tensor.astype(np.float32) * factor
            if not np.isfinite(at).all():
                raise AdapterError(
                    f"{where}: {module}.lora_{side.upper()} has values that are not finite, or too large for "
                    "float32 with the adapter's scale"
                )
    _take_copies(tensors, config, base, where)
    if tensors:
        raise AdapterError(f"{where}: the model has no place for {min(tensors)}")
    given = [(site.name, pair) for _, site, pair in pairs(adapter, config)]
    for name, pair in (*given, ("unembed", adapter.get("unembed"))):
        if pair is not None and len(pair) != 2:
            raise AdapterError(f"{where}: {name} has only one of lora_A and lora_B")
    return SavedAdapter(adapter, rank, alpha, adapter_config.base_model)


def _take_copies(
    tensors: dict[str, np.ndarray], config: ModelConfig, base: Unchanged | None, where: str
) -> None:
    """Remove PEFT's copies of base weights: of an unembedding with an adapter, and of embeddings saved on
    request.

    PEFT loads them over the base model's, so they must be equal. Raises AdapterError if they are not."""
    unembedding = "embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    shape = (config.vocab_size, config.hidden_size)
    for ours, parameter in (("embed_tokens.weight", "embed_tokens.weight"), ("lm_head.weight", unembedding)):
        module = _PREFIX + module_name(config, ours)
        for name in (f"{module}.weight", f"{module}.base_layer.weight"):
            copied = tensors.pop(name, None)
            if copied is None:
                continue
            if copied.shape != shape:
                raise AdapterError(f"{where}: {name} has shape {copied.shape}; the model's is {shape}")
            own = None if base is None else np.asarray(base(parameter))
            own = own.T if own is not None and parameter == "lm_head.weight" else own
            # Compared in the copy's precision, because it may have been rounded when it was saved.
            if own is None or not np.array_equal(own.astype(copied.dtype), copied):
                raise AdapterError(
                    f"{where}: {name} is not the base model's; weights trained beside an adapter are refused"
                )


def _read_config(directory: Path) -> AdapterConfig:
    with (directory / CONFIG_FILE).open("rb") as file:
        content = file.read(peft_config.MAX_BYTES)
    return peft_config.read(content, f"PEFT adapter {directory.name}: {CONFIG_FILE}")


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    try:
        tensors = load_file(directory / ADAPTER_FILE)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            f"PEFT adapter {directory.name}: {ADAPTER_FILE} is not safetensors: {error}"
        ) from None
    for name, tensor in tensors.items():
        if tensor.dtype.name not in _DTYPES:
            raise AdapterError(f"PEFT adapter {directory.name}: {name} is {tensor.dtype.name}, not a float")
    return tensors


def _of_file(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in files, [..., out, in], of one here."""
    return (*shape[:-2], *shape[-2:][::-1])


class _Place(NamedTuple):
    """A matrix that an adapter may have: PEFT's name of its module, and its place in our trees.

    `at` is its index on the stacked axis; None for the unembedding, which has no `stack`."""

    module: str
    site: Site
    stack: Stack | None = None
    at: int | None = None

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return self.site.factors(rank) if self.stack is None else pair_shapes(self.stack, self.site, rank)

    def pair(self, adapter: Adapter) -> dict[str, Any] | None:
        """Return the two factors, or None if the adapter has none here."""
        tree = adapter if self.stack is None else self.stack.of(adapter["layers"])
        return tree.get(self.site.name)

    def factors(self, adapter: Adapter, rank: int) -> dict[str, np.ndarray] | None:
        """Return the two factors in host memory without the padding of their rank, or None."""
        if (pair := self.pair(adapter)) is None:
            return None
        own = {side: np.asarray(pair[side] if self.at is None else pair[side][self.at]) for side in "ab"}
        return {"a": own["a"][..., :rank], "b": own["b"][..., :rank, :]}

    @property
    def layer(self) -> int | None:
        """The number of its layer in the decoder."""
        return None if self.stack is None or self.at is None else self.stack.layers[self.at]

    def new_pair(self, adapter: Adapter) -> dict[str, Any]:
        """Return the two factors, as far as they have been read."""
        tree = adapter if self.stack is None else adapter["layers"]
        if self.stack is not None and self.stack.key is not None:
            tree = tree.setdefault(self.stack.key, {})
        return tree.setdefault(self.site.name, {})


def _places(config: ModelConfig) -> list[_Place]:
    """List all matrices that an adapter of the model may have."""
    places = []
    for stack, site in trainable(config):
        for at, layer in enumerate(stack.layers):
            module = _PREFIX + adapter_module(config, site, layer)
            places.append(_Place(module, site, stack, at))
    unembed = Site("unembed", config.hidden_size, config.vocab_size, None, ("embed", "vocab"))
    return [*places, _Place(_PREFIX + module_name(config, "lm_head.weight"), unembed)]
