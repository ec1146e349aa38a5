"""Finds the exact bytes of every token, for stop strings, log-probs and text cut within a character."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from . import tokenizer_files


class TokenBytes:
    """`token_bytes(id) -> bytes`: the bytes that a token adds in the middle of a text.

    Byte-level BPE writes each byte as one printable character (`byte_level_alphabet`), and vocabularies with
    byte fallback write single bytes as "<0x0A>"; such bytes may be part of a character. Every other token is
    decoded after another token, because decoders may treat the beginning of a text differently: those like
    sentencepiece's strip its first space.
    """

    def __init__(self, read: Callable[[], Tokenizer]):
        """`read` returns the tokenizer. It is called at the first use."""
        self._reader = read
        self._cache: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: Path) -> TokenBytes:
        """Make one for a Hugging Face model folder, whose tokenizer is read at the first use.

        Raises FileNotFoundError if it has no tokenizer.
        """
        folder = Path(folder)
        if not tokenizer_files.has_tokenizer(folder):
            raise FileNotFoundError(f"{folder} has no tokenizer.json, nor any other tokenizer files")
        return cls(lambda: tokenizer_files.load(folder).backend_tokenizer)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises TokenizerError if it cannot be read."""
        return self._reader()

    def read(self) -> None:
        """Read the tokenizer now. Raises TokenizerError."""
        _ = self.tokenizer

    @cached_property
    def _decoder(self) -> str:
        decoder = self.tokenizer.decoder
        return "" if decoder is None else decoder.__getstate__().decode()

    @cached_property
    def _before(self) -> tuple[int, str]:
        """A token after which others are decoded, and its text: a plain word, the same in any position."""
        added = self.tokenizer.get_added_tokens_decoder()
        for id_ in sorted(self.tokenizer.get_vocab(with_added_tokens=False).values()):
            text = self._decode([id_])
            if id_ not in added and text.isascii() and text.isalpha():
                return id_, text
        return 0, self._decode([0])

    def __call__(self, token: int) -> bytes:
        found = self._cache.get(token)
        if found is None:
            found = self._cache[token] = self._bytes_of(token)
        return found

    def _bytes_of(self, token: int) -> bytes:
        text = self.tokenizer.id_to_token(token) if token >= 0 else None
        if text is None:  # the embedding has more rows than the vocabulary has tokens
            return b""
        if '"ByteLevel"' in self._decoder:
            return _bytes_of_characters(text)
        lone = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", text)
        if lone and '"ByteFallback"' in self._decoder:
            return bytes([int(lone[1], 16)])
        before, before_text = self._before
        together = self._decode([before, token])
        if not together.startswith(before_text):
            return self._decode([token]).encode("utf-8")
        return together[len(before_text) :].encode("utf-8")

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)


def _bytes_of_characters(text: str) -> bytes:
    """Return a token's bytes as the ByteLevel decoder does.

    A token with any character outside the alphabet is plain text."""
    if all(character in _BYTE_OF_CHARACTER for character in text):
        return bytes(_BYTE_OF_CHARACTER[character] for character in text)
    return text.encode("utf-8")


def byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's mapping from printable characters to bytes.

    Printable bytes map to themselves, the others, in order, to the characters from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = byte_level_alphabet()
