"""Reads PEFT's `adapter_config.json`, and refuses every field that a plain LoRA cannot compute.

A plain LoRA adds scale x A B to some matrices of an unchanged base model, with a rank and a scale for each
matrix. If a field of `peft.LoraConfig` asks for more than that, the adapter is refused with an error that
names the field; no field is silently ignored. Only the standard library is imported here, so that the server
can refuse an adapter before the engine sees it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

MAX_BYTES = 1 << 20
_MAX_RANK = 512  # the last of `model.lora.RANK_BUCKETS`
_MIN_ALPHA, _MAX_ALPHA = 1e-12, 1e6
_MAX_PATTERNS = 1024


class AdapterError(ValueError):
    """The adapter in the directory cannot be used with the model; the message says why."""


# These initialisations do not change the base weights, and the file holds the resulting A and B.
_INITIALISATIONS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_CONVERTED = (
    "the adapter belongs to a base model that this initialisation changed. Save it with "
    "save_pretrained(path_initial_model_for_weight_conversion=...), which makes a plain LoRA of it"
)
# Fields for which every value that is not false changes the computation, and why.
_CHANGES_THE_MODEL = {
    "use_dora": "DoRA rescales the base's weights",
    "modules_to_save": "whole modules were trained beside the adapter",
    "trainable_token_indices": "rows of the embedding were trained beside the adapter",
    "layer_replication": "layers of the base are repeated",
    "alora_invocation_tokens": "an activated LoRA applies only after its invocation tokens",
    "lora_bias": "the adapter has biases of its own",
    "megatron_config": "the layers are Megatron's",
    "use_qalora": "QA-LoRA pools the inputs in groups",
    "use_bdlora": "A or B are block-diagonal",
    "arrow_config": "Arrow routes tokens between several adapters",
    "kasa_config": "KaSA truncates the base's weights",
    "velora_config": "VeLoRA keeps projections beside the adapter, for a backward pass of its own",
    "monteclora_config": "the weights are drawn at random",
    "ensure_weight_tying": "the adapter of the embedding is tied to that of the unembedding",
}
# Fields that do not change the function: they say how training began or ran, or which files are meant.
_HARMLESS = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # read at initialisation only
        "fan_in_fan_out",  # PEFT switches it off for linear layers, and all layers here are linear
        *("merge_weights", "unsloth_fixed"),  # from old versions of PEFT, and from Unsloth
    }
)
_READ = frozenset(
    {
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        "target_parameters",
    }
)


@dataclass(frozen=True)
class AdapterConfig:
    """A plain LoRA. `ranks` and `alphas` are PEFT's `rank_pattern` and `alpha_pattern`, by module names."""

    rank: int
    alpha: float
    rslora: bool = False
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    base_model: str = ""
    targets: frozenset[str] | str | None = None
    excluded: frozenset[str] | str | None = None
    layers: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()
    parameters: frozenset[str] = frozenset()

    def rank_of(self, module: str) -> int:
        """Return the rank of a module, named as in the base model: `model.layers.0.mlp.up_proj`."""
        return _first_match(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor by which A B of a module is multiplied."""
        rank = self.rank_of(module)
        return _first_match(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def is_in_blocks(self, module: str, count: int) -> bool:
        """Return whether each of `count` matrices in a module has a share of its rank (`fused_files`)."""
        return self.rank_of(module) == count * self.rank

    def rank_in_file(self, module: str, shape: tuple[int, ...]) -> int:
        """Return the rank of the matrices whose lora_A has this module and shape.

        Stacked experts' lora_A has a row for every expert and rank, so the config tells the rank. Gate and up
        are one parameter, with the ranks of both. The matrices in a delta net's `in_proj_qkv`, or in the
        `in_proj` of a Mamba-2, may each have a share of its rank."""
        if len(shape) == 2 and module.endswith(".experts"):
            return self.rank_of(f"{module}.down_proj")
        if len(shape) == 2 and module.endswith(".experts.base_layer"):
            experts = module.removesuffix("base_layer")
            if _is_named(f"{experts}up_proj", self.parameters):
                return self.rank_of(f"{experts}up_proj")
            return self.rank_of(f"{experts}gate_up_proj") // 2
        count = {"in_proj_qkv": 3, "in_proj": 2}.get(module.rpartition(".")[2], 1)
        return shape[-2] // count if count > 1 and self.is_in_blocks(module, count) else shape[-2]

    def overall(self, ranks: Iterable[int]) -> tuple[int, float]:
        """Return one rank and alpha for a whole adapter whose A matrices have these ranks.

        The rank is the largest one. With this alpha, alpha / rank is the scale of modules without a
        pattern."""
        rank = max(ranks, default=self.rank) if self.ranks else self.rank
        if rank == self.rank:
            return rank, self.alpha * (math.sqrt(rank) if self.rslora else 1.0)
        return rank, self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank) * rank

    def targets_weight_of(self, module: str) -> bool:
        """Return whether a module has its adapter because `target_parameters` names its weight.

        PEFT then knows it by the name of the weight, also in patterns. It computes the same."""
        return _is_named(f"{module}.weight", self.parameters)

    def leaves_out(self, module: str, *, is_parameter: bool = False) -> str | None:
        """Return the name of the field that keeps PEFT from giving the module an adapter, or None.

        A parameter (stacked experts, or the weight of a module) is named like a module, with `is_parameter`.

        Follows `peft.tuners.tuners_utils.check_target_module_exists`. A regular expression is not evaluated,
        because a client could write one that takes for ever; the tensors in the file then decide.
        """
        if is_parameter:
            return None if _is_named(module, self.parameters) else "target_parameters"
        if isinstance(self.excluded, frozenset) and _is_named(module, self.excluded):
            return "exclude_modules"
        if self.targets == "all-linear":
            return "target_modules" if module == "lm_head" else None
        if not isinstance(self.targets, frozenset) or module in self.targets:
            return None
        if not _is_named(module, self.targets):
            return "target_modules"
        if self.layers is not None and not self._is_of_layers(module):
            return "layers_to_transform"
        return None

    def _is_of_layers(self, module: str) -> bool:
        parts = module.split(".")
        for place, part in enumerate(parts[1:-1], 1):
            if part.isdecimal() and (not self.layers_pattern or parts[place - 1] in self.layers_pattern):
                return int(part) in (self.layers or ())
        return False


def read(content: bytes, where: str = "adapter_config.json") -> AdapterConfig:
    """Parse a config. Raises AdapterError if it is not a plain LoRA; the message begins with `where`."""
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where} is not JSON: {str(error)[:200]}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{where} is not an object")
    try:
        return _checked(config)
    except AdapterError as error:
        raise AdapterError(f"{where}: {error}") from None


def _checked(config: dict[str, Any]) -> AdapterConfig:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type is {_shown(config.get('peft_type'))}, not 'LORA'")
    _refuse_more_than_plain(config)
    rank, base = config.get("r"), config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise AdapterError("base_model_name_or_path is not a string")
    layers = config.get("layers_to_transform")
    return AdapterConfig(
        _rank("r", rank),
        _alpha("lora_alpha", config.get("lora_alpha")),
        bool(config.get("use_rslora")),
        {
            name: _rank(f"rank_pattern[{_shown(name)}]", each)
            for name, each in _patterns(config, "rank_pattern")
        },
        {
            name: _alpha(f"alpha_pattern[{_shown(name)}]", each)
            for name, each in _patterns(config, "alpha_pattern")
        },
        base or "",
        _names(config, "target_modules"),
        _names(config, "exclude_modules"),
        None if layers is None or layers == [] else _layers(layers),
        _layers_pattern(config.get("layers_pattern")),
        _parameters(config.get("target_parameters")),
    )


def _refuse_more_than_plain(config: dict[str, Any]) -> None:
    for name, reason in _CHANGES_THE_MODEL.items():
        if config.get(name):
            raise AdapterError(f"{name} is not supported: {reason}; only plain LoRA is read")
    if config.get("bias") not in (None, "none"):
        raise AdapterError(
            f"bias is {_shown(config['bias'])}: the base's biases were trained beside the adapter; only "
            "plain LoRA is read"
        )
    init = config.get("init_lora_weights", True)
    if not (isinstance(init, bool) or init is None or str(init).lower() in _INITIALISATIONS):
        raise AdapterError(f"init_lora_weights is {_shown(init)}: {_CONVERTED}")
    known = _READ | _HARMLESS | _CHANGES_THE_MODEL.keys()
    unknown = next((name for name, value in config.items() if name not in known and value), None)
    if unknown is not None:
        raise AdapterError(
            f"{_shown(unknown)} is a field that this server does not know; if it changes nothing about what "
            "the adapter computes, remove it from the file"
        )


def _rank(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise AdapterError(f"{name} is {_shown(value)}; a rank must be a whole number from 1 to {_MAX_RANK}")
    return value


def _alpha(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not _MIN_ALPHA <= value <= _MAX_ALPHA:
        raise AdapterError(f"{name} is {_shown(value)}; it must be a positive number up to {_MAX_ALPHA:g}")
    return float(value)


def _patterns(config: dict[str, Any], name: str) -> Iterable[tuple[str, Any]]:
    """Return the values of a pattern field, by module names."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
        raise AdapterError(f"{name} is not an object of up to {_MAX_PATTERNS} modules")
    for pattern in patterns:
        if _tail(pattern) is None:
            raise AdapterError(
                f"{name}: {_shown(pattern)} is a regular expression; write the modules' names instead "
                "('q_proj', 'layers.0.self_attn.q_proj')"
            )
    return patterns.items()


def _names(config: dict[str, Any], name: str) -> frozenset[str] | str | None:
    """Return suffixes of module names, or a regular expression, or `all-linear`."""
    value = config.get(name)
    if value is None or value == []:
        return None
    if isinstance(value, str):
        return value.lower() if value.lower() == "all-linear" else value
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise AdapterError(f"{name} is neither a string nor a list of strings")
    return frozenset(value)


def _parameters(value: Any) -> frozenset[str]:
    names = [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterError("target_parameters is not a list of strings")
    for name in names:
        if name.rpartition(".")[2] not in ("gate_up_proj", "up_proj", "down_proj", "weight"):
            raise AdapterError(
                f"target_parameters is not supported for {_shown(name)}; only the experts' gate_up_proj, "
                "up_proj and down_proj, and the weights of linear modules ('mlp.up_proj.weight') are read"
            )
    return frozenset(names)


def _layers(value: Any) -> frozenset[int]:
    layers = value if isinstance(value, list) else [value]
    if not all(type(layer) is int for layer in layers):
        raise AdapterError("layers_to_transform is neither the index of a layer nor a list of indices")
    return frozenset(layers)


def _layers_pattern(value: Any) -> tuple[str, ...]:
    names = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise AdapterError(
            "layers_pattern is neither the name of a list of layers ('layers') nor a list of such names"
        )
    return tuple(names)


def _is_named(module: str, ends: frozenset[str]) -> bool:
    parts = module.split(".")
    return any(".".join(parts[start:]) in ends for start in range(len(parts)))


def _first_match(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches, as in `peft.utils.other.get_pattern_key`."""
    for pattern, value in patterns.items():
        tail, whole = _tail(pattern) or ([], False)
        start = len(module) - len(tail)
        if start < 0 or (start and (whole or module[start - 1] != ".")):
            continue
        if all(want is None or want == have for want, have in zip(tail, module[start:], strict=True)):
            return value
    return default


def _tail(pattern: str) -> tuple[list[str | None], bool] | None:
    """Return the characters of a regular expression of fixed length, and whether it begins with `^`.

    None among the characters stands for any character. Returns None for any other kind of expression."""
    whole = pattern.startswith("^")
    # PEFT puts "(.*\\.)?" before a pattern itself, and writes this prefix for the experts' parameters.
    text = pattern.removeprefix("^").removeprefix(".*\\.").removesuffix("$").replace("\\.", "\0")
    if not text or not all(each.isalnum() or each in "_.-\0" for each in text):
        return None
    return [None if each == "." else "." if each == "\0" else each for each in text], whole


def _shown(value: Any) -> str:
    return repr(value)[:64]
