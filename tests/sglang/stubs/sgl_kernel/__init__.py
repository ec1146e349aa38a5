"""Stands in for SGLang's compiled kernels, which exist for CUDA alone.

On a CPU without Intel's AMX SGLang computes in plain PyTorch, but imports names from here, for speculative
decoding and the like. They are there, and raise when they are called. PyTorch without an accelerator also
refuses memory that is pinned for one, which SGLang's adapters ask for: pinning does nothing here.
"""

import functools

import torch

__version__ = "0"


def _unpinned(create):
    @functools.wraps(create)
    def created(*given, **options):
        options.pop("pin_memory", None)
        return create(*given, **options)

    return created


if not torch.cuda.is_available():
    torch.Tensor.pin_memory = lambda tensor, *_, **__: tensor
    for _name in ("tensor", "zeros", "empty", "ones", "arange", "full"):
        setattr(torch, _name, _unpinned(getattr(torch, _name)))

# SGLang registers a shape function for this operator at import.
_operators = torch.library.Library("sgl_kernel", "FRAGMENT")
_operators.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_given, **_options):
        raise NotImplementedError(f"sgl_kernel.{name} is a compiled kernel, and not on this machine")

    missing.__name__ = name
    return missing
