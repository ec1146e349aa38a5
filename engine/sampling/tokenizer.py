"""The exact bytes of every token, for matching stop strings."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import Tokenizer


class TokenBytes:
    """`token_bytes(id) -> bytes`: what a token adds to the text, cut at byte and not at character borders.

    Byte-level BPE writes each byte as one printable character (`byte_level_alphabet`); sentencepiece-like
    vocabularies write spaces as "▁" and lone bytes as "<0x0A>". Added tokens stand for their own text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._added = {id_: token.content for id_, token in tokenizer.get_added_tokens_decoder().items()}
        decoder = json.dumps(json.loads(tokenizer.to_str()).get("decoder"))
        self._byte_level = '"ByteLevel"' in decoder
        self._cache: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: Path) -> TokenBytes:
        """Read `tokenizer.json` of a Hugging Face model folder.

        Raises FileNotFoundError if there is none.
        """
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json")
        return cls(Tokenizer.from_file(str(file)))

    def __call__(self, token: int) -> bytes:
        found = self._cache.get(token)
        if found is None:
            found = self._cache[token] = self._bytes_of(token)
        return found

    def _bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode("utf-8")
        text = self._tokenizer.id_to_token(token)
        if text is None:  # the embedding has more rows than the vocabulary has tokens
            return b""
        if self._byte_level:
            return bytes(byte for character in text for byte in _bytes_of_character(character))
        if lone := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", text):
            return bytes([int(lone[1], 16)])
        return text.replace("▁", " ").encode("utf-8")


def _bytes_of_character(character: str) -> bytes:
    byte = _BYTE_OF_CHARACTER.get(character)
    return character.encode("utf-8") if byte is None else bytes([byte])


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's bijection between printable characters and bytes: printable bytes stand for themselves, the
    others for the characters from U+0100 on, in order."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = byte_level_alphabet()
