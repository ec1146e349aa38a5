"""Tokens as JSON bodies spell them: `chunks`, `tokens` or `input_ids`."""

from __future__ import annotations

import numpy as np

from ..errors import BadRequest, ContextTooLong
from .body import Body
from .integers import Integers


class Chunk(Body):
    """Without a `type` it is text, as tokens."""

    type: str = "encoded_text"
    tokens: Integers | None = None


class ModelInput(Body):
    chunks: list[Chunk] | None = None
    tokens: Integers | None = None
    input_ids: Integers | None = None

    def ids(self, where: str) -> np.ndarray:
        """Return int64 tokens. Raises BadRequest naming the chunk, and `where` it is."""
        given = [each for each in (self.chunks, self.tokens, self.input_ids) if each is not None]
        if len(given) > 1:
            raise BadRequest(f"{where}: chunks, tokens and input_ids are the same; send one of them")
        whole = self.input_ids if self.tokens is None else self.tokens
        if whole is not None:
            return whole
        pieces = [np.empty(0, np.int64)]
        for index, chunk in enumerate(self.chunks or []):
            if chunk.type != "encoded_text" or chunk.tokens is None:
                raise BadRequest(
                    f"{where}: chunk {index}: {chunk.type[:64]} is not supported here; send encoded_text"
                )
            pieces.append(chunk.tokens)
        return np.concatenate(pieces)


def longest_prompt(context: int, max_tokens: int | None) -> int:
    """The most tokens a prompt may have: one fewer than the context, as room for a sample. A request for
    a single token may fill the context, because the SDK asks so for a prompt's log-probs."""
    return context if max_tokens == 1 else context - 1


def prompt_tokens(prompt: ModelInput, vocab_size: int, max_length: int, where: str = "prompt") -> bytes:
    """int32 tokens. Raises BadRequest naming the chunk."""
    tokens = prompt.ids(where)
    if not len(tokens):
        raise BadRequest(f"{where}: no tokens; send at least one")
    if len(tokens) > max_length:
        raise ContextTooLong(f"{where}: {len(tokens)} tokens are over the model's limit of {max_length}")
    outside = (tokens < 0) | (tokens >= (vocab_size or 1 << 31))
    if outside.any():
        position = int(outside.argmax())
        raise BadRequest(
            f"{where}: token {tokens[position]} at position {position} is outside the vocabulary "
            f"[0, {vocab_size})"
        )
    return tokens.astype("<i4").tobytes()
