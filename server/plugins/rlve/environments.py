"""Environments of reasoning-gym: they make problems and score answers, in a process of their own.

The library is optional (`make rlve`). It takes seconds to import, what it does with an answer may take
long, and a process can be stopped. The process has none of the server's environment variables. A problem
is a function of an environment, a level and a seed, so the next process makes the same ones again.
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
"""Environments that score an answer by running it (`eval`, or sympy's parser, which uses it).

A model's output, which its client can steer, would be code on the server.
"""
_LINE_BYTES = 64 << 20
_FIRST_SECONDS, _SECONDS = 120.0, 30.0  # to answer, with and without importing the library
_UNUSED_SECONDS = 60.0  # after which the process is stopped, because it holds some hundred MiB
_PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT")


def installed() -> bool:
    return importlib.util.find_spec("reasoning_gym") is not None


class NotMadeError(ApiError):
    """The library could not make this problem."""


class Problem(NamedTuple):
    """The environment, level and seed from which a problem can be made again."""

    environment: str
    level: int
    seed: int


class Environments:
    """A client of reasoning-gym, which runs in a process that is started when it is needed."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._one_at_a_time = asyncio.Lock()
        self._unused: asyncio.TimerHandle | None = None

    async def highest_level(self, name: str) -> int:
        """Return an environment's highest level. Raises BadRequest if the environment cannot be used here."""
        if not installed():
            raise BadRequest(
                "rlve_config.enabled: reasoning-gym is not installed on this server; its operator can "
                "install it"
            )
        if name in EXECUTING:
            raise BadRequest(
                f"rlve_config.environment_list: {name!r} scores answers by running them as code, which this "
                "server does not"
            )
        try:
            highest: int = await self._asked({"levels": name})
            while highest and not await self._makes(
                Problem(name, highest, 0)
            ):  # the library's number may be too high
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
        """Return a problem's question. Raises NotMadeError."""
        return await self._asked({"problem": problem})

    async def scores(self, problem: Problem, answers: list[str | None]) -> list[float]:
        """Score answers between 0 and 1 (right). Answers that cannot be scored in time are wrong."""
        try:
            return await self._asked({"problem": problem, "answers": answers})
        except NotMadeError as error:
            log.warning("answers to %s could not be scored: %s", problem.environment, error.message)
            return [0.0] * len(answers)

    async def _asked(self, request: dict[str, Any]) -> Any:
        """Send a request to the process. Raises NotMadeError if the library refuses it or takes too long."""
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
            except asyncio.CancelledError:  # its answer would be taken for that of the next request
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
                *(sys.executable, "-m", "tinsmith.server.plugins.rlve.environments"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                # Gives sets the same order in every process, so that the same numbers make the same problem.
                env=kept | {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg"},
                limit=_LINE_BYTES,
            )
        except OSError as error:
            raise Unavailable(f"reasoning-gym could not be started: {error}") from None
        return self._process

    def close(self) -> None:
        """Stop the process; the next question starts another one."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process = None


# --- in the process: it reads lines of JSON, and answers each with `{"value": ...}` or `{"error": ...}`
#
#     {"levels": name}                                    the highest level of difficulty
#     {"problem": [name, level, seed]}                    the question
#     {"problem": [name, level, seed], "answers": [...]}  the score of each answer, within 0 and 1


def highest_level(name: str) -> int:
    """Return an environment's highest level; 0 for one without a curriculum."""
    from reasoning_gym.factory import CURRICULA

    if name not in CURRICULA:
        return 0
    return max(len(each.levels) for each in CURRICULA[name]().attributes.values()) - 1


def dataset(name: str, level: int, seed: int) -> Any:
    """Make a dataset of one problem of exactly this level."""
    from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode
    from reasoning_gym.factory import CURRICULA, DATASETS, create_dataset

    if name not in CURRICULA:
        return create_dataset(name, seed=seed, size=1)
    curriculum = CURRICULA[name]()
    curriculum.set_global_level(level)
    context = DefaultCurriculumContext(mode=RangeAttributeMode.UPPER_BOUND)
    config = curriculum.generate_configuration({"seed": seed, "size": 1}, context=context)
    return DATASETS[name][0](config)


def answered(request: dict[str, Any]) -> Any:
    """Answer one request. Raises whatever the library does."""
    if "levels" in request:
        return highest_level(request["levels"])
    problems = dataset(*request["problem"])
    entry = problems[0]
    if "answers" not in request:
        return str(entry["question"])
    return [_score(problems, entry, answer) for answer in request["answers"]]


def _score(problems: Any, entry: dict[str, Any], answer: str | None) -> float:
    """Score an answer; one that the library cannot read is wrong."""
    try:
        return min(1.0, max(0.0, float(problems.score_answer(answer, entry))))
    except Exception:  # a text may make a parser raise anything
        return 0.0


def main() -> None:
    # Text that the library prints must not come between the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            body = {"value": answered(json.loads(line))}
        except Exception as error:
            body = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(body), file=out, flush=True)


if __name__ == "__main__":
    main()
