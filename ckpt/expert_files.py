"""The layouts of experts' adapters in files.

    shared             one 3-D tensor per layer and factor, named `w1` (gate), `w3` (up) and `w2` (down) as in
                       the hosted service's and the cookbook's files. The first axis is 1 for the factor that
                       the experts share: w1 and w3 have A [1, r, D] and B [E, F, r], w2 has A [E, r, F] and
                       B [1, D, r]. Experts without a gate have w1 (up) and w2; files of the hosted service
                       also have an empty w3. SGLang and tinker-cookbook read it
    per_expert         2-D tensors under the name of every expert's module, as PEFT and vLLM read them for
                       models whose experts have modules of their own; the shared factor is repeated
    target_parameters  PEFT's LoRA of stacked parameters (`peft.tuners.lora.layer.ParamWrapper`). A parameter
                       [E, in, out] with rank q has A [E q, in], expert by expert, and B [out, q E], where the
                       expert is the faster index. Gate and up are one parameter. Its rank is 2 r: A holds
                       those of gate and up, and B is block-diagonal. The wrapper of `down_proj` is called
                       `experts`, that of `gate_up_proj`, inside it, `experts.base_layer`. The model's other
                       MLPs are targeted by their weights (`mlp.up_proj.weight`), because PEFT takes the names
                       of their modules for those that experts have in earlier transformers
                       (`transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING`)

All are read. Files in which the experts differ in the factor that they share here are refused, because an
adapter has no place for them.

Letters: E experts, D hidden, F an expert's width, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from ..model.config import ModelConfig, Site
from ..model.families import module_name, parameters

ExpertForm = Literal["shared", "per_expert", "target_parameters"]
Factors = dict[str, np.ndarray]

_PARAMETERS = (
    ("gate_up_proj", ("expert_gate", "expert_up")),
    ("up_proj", ("expert_up",)),
    ("down_proj", ("expert_down",)),
)
"""transformers' names of the stacked parameters of experts, in their order in the module. Experts have one of
the first two."""


def shared_module(module: str, site: Site) -> str:
    """Return a module's name in files of the shared form; `module` is one with `{expert}` in it, or a plain
    one."""
    return module if site.experts is None else f"{_experts_of(module)}.{site.numbered}"


def _experts_of(module: str) -> str:
    """Return the name of the module that holds all experts of a layer."""
    return module.partition(".{expert}")[0] if _is_by_expert(module) else module.rpartition(".")[0]


def _is_by_expert(module: str) -> bool:
    return "{expert}" in module


def require_form(config: ModelConfig, form: ExpertForm) -> None:
    """Raise ValueError if adapters of the model cannot have this form in files."""
    experts = [site for layer in config.layers for site in layer.sites if site.experts and site.part]
    names = {module_name(config, f"layers.{site.name}.weight") for site in experts}
    if form == "per_expert" and not all(map(_is_by_expert, names)):
        raise ValueError(
            f"experts: the experts of {config.family} have no modules of their own; choose 'shared' or "
            "'target_parameters'"
        )


def is_targeted_by_weight(config: ModelConfig, site: Site, form: ExpertForm) -> bool:
    """Return whether PEFT's config names a matrix by its weight, not by its module."""
    return form == "target_parameters" and bool(config.mixtures) and site.part == "mlp"


def written(
    module: str, site: Site, pair: Factors, form: ExpertForm
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the modules that hold an adapter's matrix in files, with their A and B, [..., in, out]."""
    if site.experts is None:
        yield module, pair["a"], pair["b"]
    elif form == "shared":
        a, b = (factor if factor.ndim == 3 else factor[None] for factor in (pair["a"], pair["b"]))
        yield shared_module(module, site), a, b
    else:
        for expert in range(site.experts):
            a, b = (factor if factor.ndim == 2 else factor[expert] for factor in (pair["a"], pair["b"]))
            yield module.format(expert=expert), a, b


class Wrapper(NamedTuple):
    """A stacked parameter of one layer that PEFT adapts: its name, the module of its adapter in files, and
    the sites in it with their places on the parameter's output axis."""

    parameter: str
    module: str
    sites: tuple[Site, ...]
    parts: tuple[slice, ...]

    @property
    def name(self) -> str:
        """Return its name in every layer, for PEFT's `target_parameters`."""
        return ".".join(self.parameter.split(".")[-2:])

    def written(self, pairs: Sequence[Factors]) -> tuple[np.ndarray, np.ndarray]:
        """Return A [E q, in] and B [out, q E] of its sites' factors, each [in, r] or [E, in, r] and so on."""
        E, n, r = self.sites[0].experts, len(self.sites), pairs[0]["a"].shape[-1]
        assert E is not None
        a = np.concatenate(
            [np.broadcast_to(_by_expert(p["a"]), (E, s.into, r)) for p, s in self._of(pairs)], -1
        )
        b = np.zeros((E, n * r, sum(site.out for site in self.sites)), np.float32)
        for number, (pair, _) in enumerate(self._of(pairs)):
            b[:, number * r : (number + 1) * r, self.parts[number]] = pair["b"]
        return a.swapaxes(1, 2).reshape(E * n * r, -1), b.transpose(2, 1, 0).reshape(b.shape[2], -1)

    def _of(self, pairs: Sequence[Factors]) -> Iterator[tuple[Factors, Site]]:
        return zip(pairs, self.sites, strict=True)

    def read(self, a: np.ndarray, b: np.ndarray) -> Iterator[Factors]:
        """Yield the factors of each of its sites, [E or 1, out, in] as in files of the shared form.

        Raises ValueError if an adapter has no place for them."""
        E, n = self.sites[0].experts, len(self.sites)
        into, out = self.sites[0].into, sum(site.out for site in self.sites)
        assert E is not None
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != into or b.shape[0] != out or len(a) % (E * n):
            raise ValueError(
                f"{self.module} has factors of the shapes {a.shape} and {b.shape}; expected "
                f"[{E} x rank, {into}] and [{out}, {E} x rank]" + (f", and a rank divisible by {n}" * (n > 1))
            )
        if b.shape[1] != len(a):
            raise ValueError(f"{self.module}: lora_A has {len(a)} rows, lora_B {b.shape[1]} columns")
        a_EnrI = a.reshape(E, n, -1, into)
        b_EnrO = b.reshape(out, n, -1, E).transpose(3, 1, 2, 0)
        for number, (site, part) in enumerate(zip(self.sites, self.parts, strict=True)):
            others = np.delete(b_EnrO[..., part], number, axis=1)
            if others.any():
                raise ValueError(
                    f"{self.module}.lora_B is not block-diagonal: only adapters whose gate and up have a "
                    "factor each can be read"
                )
            factors = {"a": a_EnrI[:, number], "b": b_EnrO[:, number, :, part].swapaxes(-1, -2)}
            shared = factors[site.shared or "a"]
            if not (shared == shared[:1]).all():
                raise ValueError(f"{self.module}.lora_{(site.shared or 'a').upper()} {_DIFFER}")
            yield factors | {site.shared or "a": shared[:1]}


_DIFFER = (
    "differs from those of the other experts: only adapters whose experts share the factor at the hidden "
    "size can be read"
)


def _by_expert(factor: np.ndarray) -> np.ndarray:
    return factor if factor.ndim == 3 else factor[None]


def wrappers(config: ModelConfig, prefix: str, layer: int) -> Iterator[Wrapper]:
    """Yield the stacked parameters of a layer's experts; module names begin with `prefix`."""
    by_name = {site.name: site for site in config.layers[layer].sites if site.experts}
    stack, _ = config.places[layer]
    side_by_side = {each.path: each.part for each in parameters(config)}
    of_experts = [each for each in _PARAMETERS if by_name.keys() >= {*each[1]}]
    if len(of_experts) == len(_PARAMETERS):
        of_experts.remove(_PARAMETERS[1])  # up lies beside the gate
    for parameter, names in of_experts:
        sites, first, parts = tuple(by_name[name] for name in names), 0, []
        for site in sites:
            given = side_by_side[stack.path(f"{site.name}.weight")]
            parts.append(slice(*(given or (first, first + site.out, 1))))
            first += site.out
        experts = _experts_of(prefix + module_name(config, f"layers.{names[0]}.weight", layer))
        inner = ".base_layer" if (parameter, names) == of_experts[0] else ""
        yield Wrapper(f"{experts}.{parameter}", experts + inner, sites, tuple(parts))


def unwrapped(
    tensors: dict[str, np.ndarray], config: ModelConfig, prefix: str, layer: int
) -> Mapping[str, Wrapper]:
    """Replace a layer's tensors in the form `target_parameters` by those of the shared form.

    Returns the wrapper from which each module comes. Raises ValueError if an adapter has no place for them.
    """
    found: dict[str, Wrapper] = {}
    for wrapper in wrappers(config, prefix, layer):
        names = [f"{wrapper.module}.lora_{side}.weight" for side in "AB"]
        if not all(name in tensors for name in names):
            continue
        factors = wrapper.read(*(tensors.pop(name) for name in names))
        for site, pair in zip(wrapper.sites, factors, strict=True):
            module = f"{wrapper.parameter.rpartition('.')[0]}.{site.numbered}"
            tensors |= {f"{module}.lora_{side.upper()}.weight": pair[side] for side in "ab"}
            found[module] = wrapper
    return found


def read(module: str, site: Site, tensors: dict[str, np.ndarray]) -> tuple[str, Factors]:
    """Take the factors of a matrix out of `tensors`, as far as they are there, [..., out, in] as in files.

    The name of their module comes first; of experts with modules of their own, that of the first expert. An
    expert without an adapter gets zeros. Raises ValueError for experts that differ in the shared factor.
    """
    found: Factors = {}
    name = named = shared_module(module, site)
    for side in "ab":
        tensor = tensors.pop(f"{name}.lora_{side.upper()}.weight", None)
        if tensor is None and site.experts is not None and _is_by_expert(module):
            tensor = _of_experts(module, site, side, tensors)
            named = named if tensor is None else module.format(expert=0)
        elif tensor is not None and side == site.shared and tensor.ndim == 3 and len(tensor) == 1:
            tensor = tensor[0]
        if tensor is not None:
            found[side] = tensor
    return named, found


def _of_experts(module: str, site: Site, side: str, tensors: dict[str, np.ndarray]) -> np.ndarray | None:
    assert site.experts is not None
    names = [f"{module.format(expert=expert)}.lora_{side.upper()}.weight" for expert in range(site.experts)]
    found = [tensors.pop(name, None) for name in names]
    first = next((tensor for tensor in found if tensor is not None), None)
    if first is None:
        return None
    if side != site.shared:
        whole = [np.zeros_like(first) if tensor is None else tensor for tensor in found]
        if any(tensor.shape != first.shape for tensor in whole):
            raise ValueError(f"{names[0]} and those of the other experts have different shapes")
        return np.stack(whole)
    for name, tensor in zip(names, found, strict=True):
        if tensor is not None and not np.array_equal(tensor, first):
            raise ValueError(f"{name} {_DIFFER}")
    return first
