"""The text of samples, without what ended them, and of the conversations before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import BadRequest
from .tokenizer import ChatTokenizer

_NOT_WHOLE = "�"
_CONTEXT = 64  # tokens


@dataclass
class SampledText:
    """The growing text of one sequence after `prompt`. `keep_stop`: keep what ended it in the text."""

    tokenizer: ChatTokenizer
    stop_strings: Sequence[str]
    stop_tokens: Sequence[int]
    keep_stop: bool = False
    skip_special_tokens: bool = True
    prompt: Sequence[int] = ()
    tokens: list[int] = field(default_factory=list)
    told: str = ""
    _settled: int = 0  # tokens whose text is in `_text`, and ends with a whole character
    _text: str = ""

    def add(self, begin: int, tokens: list[int]) -> str:
        """Add tokens from the `begin`-th on; return the new text that can no longer change."""
        if begin < self._settled:  # an engine has begun the sequence again
            self._settled, self._text = 0, ""
        self.tokens[begin:] = tokens
        new = self._continuation(self._settled, self.tokens)
        if new and not new.endswith(_NOT_WHOLE):
            self._settled, self._text, new = len(self.tokens), self._text + new, ""
        # Some bytes of the last character may still be missing.
        text = self._without_stop(self._text + new.rstrip(_NOT_WHOLE))
        return self._tell(text[: len(text) - self._perhaps_stop(text)])

    def end(self, tokens: list[int], stop_reason: str) -> str:
        """Set all tokens; return the rest of the text."""
        self.tokens = tokens
        return self._tell(self.whole(tokens, stop_reason))

    def whole(self, tokens: list[int], stop_reason: str) -> str:
        """Return the text of all tokens."""
        ended_by = None if self.keep_stop else self.matched(tokens, stop_reason)
        if isinstance(ended_by, str):
            return self._before(ended_by, tokens)
        return self._continuation(0, tokens if ended_by is None else tokens[:-1])

    def matched(self, tokens: list[int], stop_reason: str) -> int | str | None:
        """Return the token or the string that ended the sequence."""
        if stop_reason != "stop":
            return None
        if tokens and tokens[-1] in self.stop_tokens:
            return tokens[-1]
        text = b"".join(map(self.tokenizer.token_bytes, tokens))
        found = [(at, stop) for stop in self.stop_strings if stop and (at := text.find(stop.encode())) >= 0]
        return min(found)[1] if found else tokens[-1] if tokens else None

    def _before(self, stop: str, tokens: list[int]) -> str:
        """Return the text before a stop string.

        It is searched as the sampler does: in the bytes of all tokens, including special ones. It may begin
        within a token.
        """
        pieces = [self.tokenizer.token_bytes(token) for token in tokens]
        at, whole = b"".join(pieces).find(stop.encode()), 0
        while whole < len(pieces) and len(pieces[whole]) <= at:
            at -= len(pieces[whole])
            whole += 1
        rest = pieces[whole][:at].decode(errors="ignore") if whole < len(pieces) else ""
        return self._continuation(0, tokens[:whole]) + rest

    def _continuation(self, begin: int, tokens: list[int]) -> str:
        before = [*self.prompt[-_CONTEXT:], *tokens[max(0, begin - _CONTEXT) : begin]]
        return self.tokenizer.continuation(before, tokens[begin:], self.skip_special_tokens)

    def _without_stop(self, text: str) -> str:
        if self.keep_stop:
            return text
        ends = [at for stop in self.stop_strings if stop and (at := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    def _perhaps_stop(self, text: str) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        if self.keep_stop:
            return 0
        longest = max((len(stop) for stop in self.stop_strings), default=0)
        return next(
            (
                length
                for length in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self.stop_strings)
            ),
            0,
        )

    def _tell(self, text: str) -> str:
        new = text[len(self.told) :]  # sent text cannot be taken back
        self.told += new
        return new


# --- conversations as OpenAI's clients send them

Turn = dict[str, Any]
_DEVELOPER, _SYSTEM = "developer", "system"
_ROLES_OF_TOOLS = ("tool", "function")  # whose names repeat those of the calls


def written_conversation(text: ChatTokenizer, turns: list[Turn], /, **variables: Any) -> str:
    """Return the text of a conversation that the model continues.

    Templates know few roles and fields, and drop others silently. So a developer's message becomes a system
    message if the template has no such role, and names and tool calls that the template would drop are
    refused. `variables`: further variables of the template. Raises BadRequest.
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
