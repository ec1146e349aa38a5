"""What a sample says, as text: without what ended it, and without what may turn out to be its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .tokenizer import ChatTokenizer


@dataclass
class SampledText:
    """One sequence's growing text. `keep_stop`: what ended it is part of it."""

    tokenizer: ChatTokenizer
    stop_strings: Sequence[str]
    stop_tokens: Sequence[int]
    keep_stop: bool = False
    skip_special_tokens: bool = True
    tokens: list[int] = field(default_factory=list)
    told: str = ""

    def add(self, begin: int, tokens: list[int]) -> str:
        """Tokens from the `begin`-th on; the text that is certain now and was not before."""
        self.tokens[begin:] = tokens
        text = self._without_stop(self.tokenizer.whole_characters(self.tokens, self.skip_special_tokens))
        return self._tell(text[: len(text) - self._perhaps_stop(text)])

    def end(self, tokens: list[int], stop_reason: str) -> str:
        """All tokens; the rest of the text."""
        self.tokens = tokens
        return self._tell(self.whole(tokens, stop_reason))

    def whole(self, tokens: list[int], stop_reason: str) -> str:
        ended_by = self.matched(tokens, stop_reason)
        if isinstance(ended_by, int) and not self.keep_stop:
            tokens = tokens[:-1]
        text = self.tokenizer.decode(tokens, self.skip_special_tokens)
        return self._without_stop(text) if stop_reason == "stop" else text

    def matched(self, tokens: list[int], stop_reason: str) -> int | str | None:
        """The token or the string that ended it."""
        if stop_reason != "stop":
            return None
        if tokens and tokens[-1] in self.stop_tokens:
            return tokens[-1]
        text = self.tokenizer.decode(tokens, self.skip_special_tokens)
        found = [(text.find(stop), stop) for stop in self.stop_strings if stop in text]
        return min(found)[1] if found else tokens[-1] if tokens else None

    def _without_stop(self, text: str) -> str:
        if self.keep_stop:
            return text
        ends = [at for stop in self.stop_strings if stop and (at := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    def _perhaps_stop(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
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
        if not text.startswith(self.told):  # what was told cannot be taken back
            return ""
        new, self.told = text[len(self.told) :], text
        return new
