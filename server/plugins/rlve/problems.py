"""A wave of problems as prompts for one model.

A problem as a prompt, and the answer in what the model says.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

from ...errors import BadRequest
from ...text.tokenizer import ChatTokenizer, of_folder
from ...wire.requests import AnswerMarker, PromptPreprocessor, RlveConfig
from .environments import Environments, NotMadeError
from .rollouts import Difficulty, Draw, draws

_ASKED_AS = {
    "<answer></answer>": "in <answer> </answer> tags",
    "\\boxed{}": "in \\boxed{}",
    "none": "alone, without anything else",
}
# As base models are asked since DeepSeek-R1-Zero (arXiv:2501.12948, table 1), in the form of TinyZero.
_CONVERSATION = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
    "Assistant first thinks about it in <think> </think> tags, and then gives the final answer {where}.\n"
    "User: {question}\nAssistant: Let me solve this step by step.\n<think>"
)
_TURN = "{question}\n\nGive the final answer {where}."


def prompt(
    question: str, preprocessor: PromptPreprocessor, marker: AnswerMarker, tokenizer: ChatTokenizer
) -> list[int]:
    """Tokens. Raises BadRequest for a model without the chat template that is asked for."""
    where = _ASKED_AS[marker]
    if preprocessor == "TinyZero":
        return tokenizer.encode(_CONVERSATION.format(question=question, where=where))
    content = question if marker == "none" else _TURN.format(question=question, where=where)
    return tokenizer.conversation([{"role": "user", "content": content}])


def answer(text: str, marker: AnswerMarker) -> str | None:
    """The last one that is marked; None: there is none."""
    if marker == "none":
        return text.strip()
    if marker == "\\boxed{}":
        return _boxed(text)
    marked = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return marked[-1].strip() if marked else None


def _boxed(text: str) -> str | None:
    """What is in the last box, which may have braces in it."""
    begin = text.rfind("\\boxed{")
    if begin < 0:
        return None
    depth = 0
    for at in range(begin + len("\\boxed"), len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[begin + len("\\boxed{") : at].strip()
    return None


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
