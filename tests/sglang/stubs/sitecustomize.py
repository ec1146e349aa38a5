"""Stands in, on a machine without CUDA, for packages that SGLang imports there and never uses.

SGLang imports Triton, torchvision and a few others whatever it runs on. What exists of them needs CUDA, or
hundreds of megabytes, and for a text model on a CPU nothing of it is ever called. With this directory on
PYTHONPATH (which the processes that SGLang starts inherit) such an import succeeds: every name in it is a
placeholder that can be subclassed, subscripted and used as a decorator. A package that is installed is taken
instead, and whoever only asks whether one is there (transformers does) hears that it is not.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType

PACKAGES = frozenset({"triton", "torchvision", "IPython", "soundfile", "gguf", "scipy"})


def _is_dunder(name):
    return name.startswith("__") and name.endswith("__")


def _decorator(*given, **options):
    """`@jit` and `@jit(...)` leave what they decorate as it is."""
    if len(given) == 1 and not options and isinstance(given[0], (FunctionType, type)):
        return given[0]
    return _decorator


class Placeholder(type):
    """The type of the names in these packages."""

    def __new__(cls, name, bases=(), namespace=None):
        return super().__new__(cls, name, bases, namespace or {})

    def __init__(cls, name, bases=(), namespace=None):
        super().__init__(name, bases, namespace or {})

    def __getattr__(cls, name):
        if _is_dunder(name):
            raise AttributeError(name)
        if name == "get_current_target":  # which GPU Triton compiles for
            raise RuntimeError("there is no Triton on this machine")
        return Placeholder(name)

    def __getitem__(cls, _parameters):
        return cls

    def __call__(cls, *given, **options):
        if cls.__bases__ == (object,):  # not a class that was derived from one
            return _decorator(*given, **options)
        return super().__call__(*given, **options)


class StandIn(ModuleType):
    """A package, or a module in one."""

    def __getattr__(self, name):
        if _is_dunder(name):
            raise AttributeError(name)
        loaded = sys.modules.get(f"{self.__name__}.{name}")
        value = Placeholder(name) if loaded is None else loaded
        setattr(self, name, value)
        return value


class StandIns(MetaPathFinder, Loader):
    """Last among the finders: what is installed has been found before."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] not in PACKAGES or _is_only_asked():
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        module = StandIn(spec.name)
        module.__version__ = "0"
        module.__path__ = []
        return module

    def exec_module(self, module):
        if module.__name__ == "triton":
            module.cdiv = lambda a, b: -(-a // b)
            module.next_power_of_2 = lambda n: 1 << max(n - 1, 0).bit_length()
            _tell_torch_that_there_is_none()


def _is_only_asked():
    """Return whether the caller is `importlib.util.find_spec`."""
    frame = sys._getframe(2)
    while frame is not None and "importlib._bootstrap" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == "importlib.util"


def _tell_torch_that_there_is_none():
    about_triton = sys.modules.get("torch.utils._triton")
    for name in ("has_triton_package", "has_triton"):
        if about_triton is not None:
            setattr(about_triton, name, lambda: False)


sys.meta_path.append(StandIns())
