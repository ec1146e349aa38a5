"""The end of a generated sequence: stop tokens, stop strings and the length limit.

Only generated tokens count, never the prompt. The token that completes a stop is part of the sequence: for a
stop string that is the whole token in which the string ends, even if the token's text runs past it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

StopReason = Literal["stop", "length"]
LOOKED_AT = 8


class StopStrings:
    """Finds the first of several strings in a growing text, one piece of bytes at a time.

    Works on bytes, so that a character cut in two by a token border is seen when its last byte arrives.
    """

    def __init__(self, strings: Sequence[str]):
        self._needles = [string.encode("utf-8") for string in strings if string]
        self._kept = max((len(needle) for needle in self._needles), default=1) - 1
        self._tail = b""

    def found_in(self, piece: bytes) -> bool:
        """Append `piece` to the text; True if a stop string ends within it."""
        if not self._needles:
            return False
        text = self._tail + piece
        # A match may begin in the tail, and must end in the piece: the tail is shorter than the longest
        # needle, but may hold a shorter one whole, that ended earlier and was reported then.
        found = any(
            text.find(needle, max(0, len(self._tail) - len(needle) + 1)) >= 0 for needle in self._needles
        )
        self._tail = text[-self._kept :] if self._kept else b""
        return found


class StopRule:
    """The stopping rule of one sequence; feed it each sampled token in order.

    `token_bytes` gives the exact bytes of a token (`engine.tokenizer`), needed for stop strings only.
    """

    def __init__(
        self,
        stop_tokens: Sequence[int],
        stop_strings: Sequence[str],
        max_tokens: int,
        token_bytes: Callable[[int], bytes] | None,
    ):
        self.stop_tokens = frozenset(stop_tokens)
        self.looked_at = list(self.stop_tokens)[:LOOKED_AT]
        """The stop tokens that the device looks at, to end a chunk early; the host looks at all."""
        self._strings = StopStrings(stop_strings)
        if any(stop_strings) and token_bytes is None:
            raise ValueError("stop strings need a tokenizer")
        self._token_bytes = token_bytes if any(stop_strings) else None
        self.remaining = max_tokens

    def after(self, token: int) -> StopReason | None:
        """Return why the sequence ends with this token, if it does. A stop wins over the length."""
        self.remaining -= 1
        by_text = self._token_bytes is not None and self._strings.found_in(self._token_bytes(token))
        if by_text or token in self.stop_tokens:
            return "stop"
        return "length" if self.remaining <= 0 else None


def implicit_stop_tokens(
    stop_tokens: Sequence[int] | None, stop_strings: Sequence[str], eos_token_ids: Sequence[int]
) -> Sequence[int]:
    """Return the stop tokens in force: the model's own only if the client named neither tokens nor
    strings."""
    if stop_tokens is not None:
        return stop_tokens
    return () if stop_strings else eos_token_ids
