"""Conversations as OpenAI's clients send them, as the model's chat template writes them."""

from __future__ import annotations

from typing import Any

from ..errors import BadRequest
from .tokenizer import ChatTokenizer

Turn = dict[str, Any]
_DEVELOPER, _SYSTEM = "developer", "system"
_ROLES_OF_TOOLS = ("tool", "function")  # their names repeat those of the calls


def written(text: ChatTokenizer, turns: list[Turn], /, **variables: Any) -> str:
    """Return the text that the model is to go on with.

    Templates know few roles and fields, and drop others silently. So a developer's message is a system one
    where the template has none of that role, and names and tool calls that the template would drop are
    refused. `variables`: further ones of the template. Raises BadRequest.
    """
    found = _with_developer(text, turns, variables)
    checked = set()
    for place, turn in enumerate(turns):
        for name in ("name", "tool_calls"):
            kind = (turn["role"], name)
            if name not in turn or kind in checked or turn["role"] in _ROLES_OF_TOOLS:
                continue
            checked.add(kind)
            without = {key: value for key, value in turn.items() if key != name}
            if _with_developer(text, [*turns[:place], without, *turns[place + 1 :]], variables) == found:
                raise BadRequest(
                    f"messages[{place}].{name}: the model's chat template does not write it; leave it out"
                )
    return found


def _with_developer(text: ChatTokenizer, turns: list[Turn], variables: dict[str, Any]) -> str:
    others = [turn for turn in turns if turn["role"] != _DEVELOPER]
    if len(others) == len(turns):
        return text.written(turns, **variables)
    as_system = [turn | {"role": _SYSTEM} if turn["role"] == _DEVELOPER else turn for turn in turns]
    try:
        found = text.written(turns, **variables)
        dropped = bool(others) and found == text.written(others, **variables)
    except BadRequest:
        return text.written(as_system, **variables)
    return text.written(as_system, **variables) if dropped else found
