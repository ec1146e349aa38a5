"""reasoning-gym's environments, as the server asks for them.

The library is optional (`make rlve`). It runs in a process of its own (gym.py): it takes
seconds to import, what it does with an answer may take long, and a process can be ended. It has none of the
server's environment variables. What it has made is made again by the next process, from the same numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import sys
from typing import Any, NamedTuple

from ...errors import ApiError, BadRequest, Unavailable

log = logging.getLogger("tinsmith.rlve")

EXECUTING = frozenset(
    {
        *("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication"),
        *("puzzle24", "simple_integration", "spiral_matrix", "string_insertion"),
    }
)
"""Environments that score an answer by running it (`eval`, or sympy's parser, which is made of it): what a
model says, and so what its client wants it to say, would be code on the server."""
_LINE_BYTES = 64 << 20
_FIRST_SECONDS, _SECONDS = 120.0, 30.0  # for an answer: with the library's import, and without
_UNUSED_SECONDS = 60.0  # after which the process ends: it takes some hundred MiB
_PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT")


def installed() -> bool:
    return importlib.util.find_spec("reasoning_gym") is not None


class NotMadeError(ApiError):
    """The library made no problem of these numbers."""


class Problem(NamedTuple):
    environment: str
    level: int
    seed: int


class Environments:
    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._one_at_a_time = asyncio.Lock()
        self._unused: asyncio.TimerHandle | None = None

    async def highest_level(self, name: str) -> int:
        """Raises BadRequest for an environment that cannot be had here."""
        if not installed():
            raise BadRequest(
                "rlve_config.enabled: this server is without reasoning-gym; its operator can install it"
            )
        if name in EXECUTING:
            raise BadRequest(
                f"rlve_config.environment_list: {name!r} scores answers by running them as code, which this "
                "server does not"
            )
        try:
            highest: int = await self._asked({"levels": name})
            while highest and not await self._makes(Problem(name, highest, 0)):  # the library says too much
                highest -= 1
            await self.question(Problem(name, 0, 0))
        except NotMadeError as error:
            raise BadRequest(
                f"rlve_config.environment_list: reasoning-gym has no environment {name!r} ({error.message}); "
                "its names are like chain_sum, number_sorting, spell_backward"
            ) from None
        return highest

    async def _makes(self, problem: Problem) -> bool:
        try:
            await self.question(problem)
        except NotMadeError:
            return False
        return True

    async def question(self, problem: Problem) -> str:
        """Raises NotMadeError."""
        return await self._asked({"problem": problem})

    async def scores(self, problem: Problem, answers: list[str | None]) -> list[float]:
        """Within 0 and 1, where 1 is right. Answers that cannot be scored in time are wrong."""
        try:
            return await self._asked({"problem": problem, "answers": answers})
        except NotMadeError as error:
            log.warning("answers to %s could not be scored: %s", problem.environment, error.message)
            return [0.0] * len(answers)

    async def _asked(self, request: dict[str, Any]) -> Any:
        """Raises NotMadeError for what the library refuses, or does not answer in time."""
        async with self._one_at_a_time:
            if self._unused is not None:
                self._unused.cancel()
            process, seconds = self._process, _SECONDS
            if process is None or process.returncode is not None:
                process, seconds = await self._begin(), _FIRST_SECONDS
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                line = await asyncio.wait_for(process.stdout.readline(), seconds)
            except (TimeoutError, ConnectionError, ValueError):
                line = b""
            except asyncio.CancelledError:  # its answer would be taken for the next one's
                self.close()
                raise
            if not line:
                self.close()
                raise NotMadeError("no answer in time")
            self._unused = asyncio.get_running_loop().call_later(_UNUSED_SECONDS, self.close)
        body = json.loads(line)
        if "error" in body:
            raise NotMadeError(body["error"][:500])
        return body["value"]

    async def _begin(self) -> asyncio.subprocess.Process:
        kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tinsmith.server.plugins.rlve.gym"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                # Sets have the same order in every process, so that the same numbers make the same problem.
                env=kept | {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg"},
                limit=_LINE_BYTES,
            )
        except OSError as error:
            raise Unavailable(f"reasoning-gym could not be started: {error}") from None
        return self._process

    def close(self) -> None:
        """Ends the process; the next question begins another one."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process = None
