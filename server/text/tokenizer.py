"""Text into a base model's tokens and back, and conversations by its chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...ckpt import tokenizer_files
from ...ckpt.token_bytes import TokenBytes
from ..errors import BadRequest
from . import chat_template

_NOT_WHOLE = "�"  # what half a character is decoded as
_CONTEXT = 8  # tokens before a piece of text that it is decoded with


class ChatTokenizer:
    """A model folder's tokenizer as transformers loads it, and the tokens that end what the model says."""

    def __init__(self, folder: Path):
        """Raises BadRequest for a folder without a tokenizer, or with one that cannot be read."""
        try:
            self._tokenizer = tokenizer_files.load(folder)
        except tokenizer_files.TokenizerError as error:
            raise BadRequest(
                f"{error}, and text cannot be read or written: /api/v1/asample takes and answers token ids"
            ) from None
        self._backend = self._tokenizer.backend_tokenizer
        self._special = frozenset(self._tokenizer.all_special_ids)
        self.token_bytes = TokenBytes(lambda: self._backend)
        """The exact bytes of a token, which may be a part of a character."""
        own = self._tokenizer.eos_token_id  # where no file names it, the one of the tokenizer's class
        ends = tokenizer_files.end_tokens(folder)
        self.end_tokens = [*ends, own] if isinstance(own, int) and own not in ends else [*ends]

    def description(self) -> dict[str, Any]:
        """A `tokenizer.json` with all tokens, and what transformers says beside it."""
        tokenizer = self._tokenizer
        ids = ("pad_token_id", "eos_token_id", "bos_token_id")
        return json.loads(self._backend.to_str()) | {
            "tokenizer_type": type(tokenizer).__name__,
            "vocab_size": self._backend.get_vocab_size(with_added_tokens=False),
            "special_tokens": tokenizer.special_tokens_map,
            "chat_template": tokenizer.chat_template,
            **{name: getattr(tokenizer, name) for name in ids},
        }

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises BadRequest for a text that the vocabulary cannot write."""
        try:
            # The batch call lets other threads run meanwhile.
            return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except Exception as error:  # the library raises nothing narrower
            said = str(error).encode(errors="replace").decode()
            raise BadRequest(f"the model's tokenizer does not take this text: {said}") from None

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens that begin one."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def continuation(
        self, before: Sequence[int], tokens: Sequence[int], skip_special_tokens: bool = True
    ) -> str:
        """The text that `tokens` add to that of the tokens `before` them.

        Decoders of sentencepiece's kind strip a space at the beginning of a text, so a sample that is
        decoded without its prompt loses it.
        """
        tail: Sequence[int] = before[-_CONTEXT:]
        before_text = self.decode(tail, skip_special_tokens)
        while not before_text and len(tail) < len(before):  # none of them is written: look further back
            tail = before[-2 * len(tail) :]
            before_text = self.decode(tail, skip_special_tokens)
        whole = self.decode([*tail, *tokens], skip_special_tokens)
        for beginning in (before_text, before_text.rstrip(_NOT_WHOLE)):  # may end within a character
            if whole.startswith(beginning):
                return whole[len(beginning) :]
        return self.decode(tokens, skip_special_tokens)

    def matched_text(self, tokens: Sequence[int]) -> str:
        """All that tokens write, special ones too: the text that stop strings are looked for in."""
        return b"".join(map(self.token_bytes, tokens)).decode(errors="replace")

    def token(self, token: int) -> str:
        """What one token is written as; a part of a character as OpenAI writes it, `bytes:\\xe2\\x82`."""
        written = self.token_bytes(token)
        try:
            return written.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)

    def lengths(self, tokens: Sequence[int]) -> list[int]:
        """How many characters of the text each token begins; special tokens are not part of the text."""
        return [0 if token in self._special else _characters(self.token_bytes(token)) for token in tokens]

    def conversation(self, turns: list[dict[str, Any]], /, **variables: Any) -> list[int]:
        """The tokens of `written`."""
        return self.encode_written(self.written(turns, **variables))

    def written(self, turns: list[dict[str, Any]], /, **variables: Any) -> str:
        """The text of a conversation that the model is to go on with.

        `variables` are further ones of the template, as `apply_chat_template` takes them: `tools`,
        `documents`, `enable_thinking`. Raises BadRequest for a conversation that the template does not take.
        """
        return chat_template.rendered(self._tokenizer, turns, variables)

    def encode_written(self, text: str) -> list[int]:
        """The tokens of what a template has written, special ones included. Raises BadRequest."""
        return self.encode(text, add_special_tokens=False)


def _characters(utf8: bytes) -> int:
    """How many begin in it."""
    return sum(byte & 0xC0 != 0x80 for byte in utf8)


@lru_cache(maxsize=16)
def of_folder(folder: Path) -> ChatTokenizer:
    """Read once. The first call in a process takes seconds: make it in a thread. Raises BadRequest."""
    return ChatTokenizer(folder)
