"""How the adapters of experts lie in files.

    shared      one 3-D tensor per layer and factor, named `w1` (gate), `w3` (up) and `w2` (down) as in the
                hosted service's and the cookbook's files. The first axis is 1 for the factor that the experts
                share: w1 and w3 have A [1, r, D] and B [E, F, r], w2 has A [E, r, F] and B [1, D, r]. SGLang
                and tinker-cookbook read it
    per_expert  2-D tensors under the name of every expert's module, as PEFT and vLLM read them; the shared
                factor is repeated

Both are read. Files in which the experts differ in the factor that they share here are refused, because an
adapter has no place for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from ..model.config import Site

ExpertForm = Literal["shared", "per_expert"]
Factors = dict[str, np.ndarray]

_SHARED_NAMES = {"expert_gate": "w1", "expert_down": "w2", "expert_up": "w3"}


def shared_module(module: str, site: Site) -> str:
    """Return a module's name in files of the shared form; `module` is one with `{expert}` in it, or a plain
    one."""
    if site.experts is None:
        return module
    experts = module.partition(".{expert}")[0] if _is_by_expert(module) else module.rpartition(".")[0]
    return f"{experts}.{_SHARED_NAMES[site.name]}"


def _is_by_expert(module: str) -> bool:
    return "{expert}" in module


def written(
    module: str, site: Site, pair: Factors, form: ExpertForm
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the modules that hold an adapter's matrix in files, with their A and B, [..., in, out]."""
    if site.experts is None:
        yield module, pair["a"], pair["b"]
    elif form == "shared":
        a, b = (factor if factor.ndim == 3 else factor[None] for factor in (pair["a"], pair["b"]))
        yield shared_module(module, site), a, b
    elif not _is_by_expert(module):
        raise ValueError(f"the experts of {module} have no modules of their own: only the shared form exists")
    else:
        for expert in range(site.experts):
            a, b = (factor if factor.ndim == 2 else factor[expert] for factor in (pair["a"], pair["b"]))
            yield module.format(expert=expert), a, b


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
            raise ValueError(
                f"{name} differs from those of the other experts: only adapters whose experts share the "
                "factor at the hidden size can be read"
            )
    return first
