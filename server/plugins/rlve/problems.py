"""A wave of problems as prompts for one model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from ...errors import BadRequest
from ...text.tokenizer import of_folder
from ...wire.rlve import RlveConfig
from .difficulty import Difficulty
from .environments import Environments, NotMadeError
from .prompts import prompt
from .rollouts import Draw, draws

_DRAWS_PER_PROMPT = 10  # some problems cannot be made, or are too long


class Problems:
    """`max_tokens`: of a prompt and its answer together."""

    def __init__(self, config: RlveConfig, environments: Environments, folder: Path, max_tokens: int):
        self.tokenizer = of_folder(folder)
        self._config = config
        self._environments = environments
        self._max_tokens = max_tokens

    def room(self, tokens: list[int]) -> int:
        """For an answer to the prompt; 0 or less: none."""
        return min(self._config.rollout_max_response_len, self._max_tokens - len(tokens))

    async def wave(
        self, difficulties: Mapping[str, Difficulty], step: int, wave: int
    ) -> list[tuple[Draw, list[int]]]:
        """Those of a step's wave that can be made and leave room for an answer, and their prompts. Raises
        BadRequest if there are not enough of them."""
        found: list[tuple[Draw, list[int]]] = []
        drawn = itertools.islice(
            draws(self._config, difficulties, step, wave), _DRAWS_PER_PROMPT * self._config.wave
        )
        for draw in drawn:
            try:
                question = await self._environments.question(draw.problem)
            except NotMadeError:
                continue
            how, marker = self._config.custom_prompt_preprocessor, self._config.answer_marker_type
            tokens = prompt(question, how, marker, self.tokenizer)
            if self.room(tokens) > 0:
                found.append((draw, tokens))
            if len(found) == self._config.wave:
                return found
        raise BadRequest(
            f"rlve: of {_DRAWS_PER_PROMPT * self._config.wave} problems only {len(found)} could be made and "
            f"fit the model's {self._max_tokens} tokens"
        )
