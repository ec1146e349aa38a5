"""reasoning-gym in a process of its own: problems are made and answers scored there, a line of JSON each.

`python -m tinsmith.server.plugins.rlve.gym` reads from its standard input:

    {"levels": name}                            -> the highest level of difficulty
    {"problem": [name, level, seed]}            -> the question
    {"problem": [name, level, seed], "answers": [...]} -> the score of each, within 0 and 1

and answers `{"value": ...}`, or `{"error": ...}`. A problem is a function of these three, so nothing is kept
from line to line. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def highest_level(name: str) -> int:
    """0 for an environment without a curriculum."""
    from reasoning_gym.factory import CURRICULA

    if name not in CURRICULA:
        return 0
    return max(len(each.levels) for each in CURRICULA[name]().attributes.values()) - 1


def dataset(name: str, level: int, seed: int) -> Any:
    """Of one problem, that of this level alone."""
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
    """Raises whatever the library does."""
    if "levels" in request:
        return highest_level(request["levels"])
    problems = dataset(*request["problem"])
    entry = problems[0]
    if "answers" not in request:
        return str(entry["question"])
    return [_score(problems, entry, answer) for answer in request["answers"]]


def _score(problems: Any, entry: dict[str, Any], answer: str | None) -> float:
    """An answer that the library cannot read is a wrong one."""
    try:
        return min(1.0, max(0.0, float(problems.score_answer(answer, entry))))
    except Exception:  # whatever a text may do to a parser
        return 0.0


def main() -> None:
    # What the library prints must not get among the answers.
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
