"""Tokens as JSON bodies spell them: `chunks`, `tokens` or `input_ids`."""

from __future__ import annotations

import numpy as np
from pydantic import StrictInt

from ..errors import BadRequest, ContextTooLong
from .body import Body


class Chunk(Body):
    """Without a `type` it is text, as tokens."""

    type: str = "encoded_text"
    tokens: list[StrictInt] | None = None


class ModelInput(Body):
    chunks: list[Chunk] | None = None
    tokens: list[StrictInt] | None = None
    input_ids: list[StrictInt] | None = None

    def ids(self, where: str) -> list[int]:
        """Raises BadRequest naming the chunk, and `where` it is."""
        given = [each for each in (self.chunks, self.tokens, self.input_ids) if each is not None]
        if len(given) > 1:
            raise BadRequest(f"{where}: chunks, tokens and input_ids are the same; send one of them")
        if self.chunks is None:
            return self.tokens or self.input_ids or []
        ids: list[int] = []
        for index, chunk in enumerate(self.chunks):
            if chunk.type != "encoded_text" or chunk.tokens is None:
                raise BadRequest(
                    f"{where}: chunk {index}: {chunk.type[:64]} is not supported here; send encoded_text"
                )
            ids += chunk.tokens
        return ids


def prompt_tokens(prompt: ModelInput, vocab_size: int, max_length: int, where: str = "prompt") -> bytes:
    """int32 tokens. Raises BadRequest naming the chunk."""
    tokens = prompt.ids(where)
    if not tokens:
        raise BadRequest(f"{where}: no tokens; send at least one")
    if len(tokens) > max_length:
        raise ContextTooLong(f"{where}: {len(tokens)} tokens are over the model's limit of {max_length}")
    for position, token in enumerate(tokens):
        if not 0 <= token < (vocab_size or 1 << 31):
            raise BadRequest(
                f"{where}: token {token} at position {position} is outside the vocabulary [0, {vocab_size})"
            )
    return np.asarray(tokens, "<i4").tobytes()
