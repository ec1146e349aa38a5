"""Compiled programs, by what they were compiled for; each compilation is timed, counted and reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.sharding import Mesh

from .compilation import compiling

OnCompile = Callable[[str, float], None]
"""A function that gets the name of a compiled program, and the seconds that its compilation took."""


class Programs:
    """Ahead-of-time compiled functions. Nothing is compiled twice, and every compilation is reported."""

    def __init__(self, mesh: Mesh, on_compile: OnCompile | None = None):
        self._mesh = mesh
        self._on_compile = on_compile
        self._compiled: dict[Hashable, jax.stages.Compiled] = {}
        self.compile_seconds: dict[str, float] = {}
        self.largest_bytes = 0
        """The temporary memory of the largest program on each device, as reported by the compiler."""

    def __len__(self) -> int:
        return len(self._compiled)

    def get(
        self,
        key: Hashable,
        name: str,
        function: Callable,
        arguments: tuple,
        *,
        donate: tuple[int, ...] = (),
        out_shardings: Any = None,
    ) -> jax.stages.Compiled:
        """Return the program of that key, compiled for `arguments` (arrays or ShapeDtypeStructs) if it is
        new.

        State that goes in and comes out has its sharding pinned by `out_shardings`, or the next call would
        not fit.
        """
        if key not in self._compiled:
            began = time.perf_counter()
            jitted = jax.jit(function, donate_argnums=donate, out_shardings=out_shardings)
            with jax.set_mesh(self._mesh), compiling(name):
                self._compiled[key] = jitted.lower(*arguments).compile()
            self.compile_seconds[name] = seconds = time.perf_counter() - began
            if (analysis := self._compiled[key].memory_analysis()) is not None:
                self.largest_bytes = max(self.largest_bytes, analysis.temp_size_in_bytes)
            if self._on_compile:
                self._on_compile(name, seconds)
        return self._compiled[key]
