"""A problem as a prompt, and the answer in what the model says."""

from __future__ import annotations

import re

from ...text.tokenizer import ChatTokenizer
from ...wire.rlve import AnswerMarker, PromptPreprocessor

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
