"""Loads the tokenizer of a model folder with transformers.

`AutoTokenizer` decides what the files mean: which files count, which class reads them, and which tokens only
special_tokens_map.json, added_tokens.json or tokenizer_config.json define. It is imported at the first use,
which takes about two seconds without torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Files that an exported model or adapter gets from its base model's folder, if that has them."""

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
"""A folder with any of these has a tokenizer."""

_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")

_reading = threading.Lock()


class TokenizerError(ValueError):
    """The folder has no tokenizer, or one that transformers cannot read."""


def without_torch() -> None:
    """Keep this process from importing torch, which transformers imports if it is installed.

    Tokenizers and chat templates do not need it. Call it before anything imports transformers.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


def has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _VOCABULARIES)


def load(folder: Path) -> PreTrainedTokenizerBase:
    """Read a folder's tokenizer once; later calls return the same object. Safe to call from any thread.

    Truncation and padding saved in tokenizer.json are switched off. Raises TokenizerError.
    """
    with _reading:
        return _load(folder)


@lru_cache(maxsize=16)
def _load(folder: Path) -> PreTrainedTokenizerBase:
    if (problem := _problem(folder)) is not None:
        raise TokenizerError(problem)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # otherwise transformers warns that torch is missing
    from transformers import AutoTokenizer

    try:
        # Python code in the folder is never run, and the hub is never contacted.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each tokenizer class raises different exceptions
        raise TokenizerError(f"this model's tokenizer cannot be read: {_reason(folder, error)}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(
            f"this model's tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json"
        )
    if len(backend.get_vocab(with_added_tokens=False)) <= len(tokenizer.all_special_tokens):
        # Some classes make an empty vocabulary if they find no file that they know.
        raise TokenizerError(f"this model's tokenizer files do not fit its {type(tokenizer).__name__}")
    backend.no_truncation()
    backend.no_padding()
    return tokenizer


def _problem(folder: Path) -> str | None:
    """Return why transformers cannot read the folder's tokenizer, if its own error does not say so."""
    if not has_tokenizer(folder):
        return "this model has no tokenizer.json, nor any other tokenizer files"
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        try:
            json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            return f"this model's {name} cannot be read: {getattr(error, 'strerror', None) or error}"
    others = [name for name in _SENTENCEPIECE if (folder / name).is_file()]
    if others and not (folder / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
        return (
            f"this model's {others[0]} needs the package sentencepiece, which the server does not have; "
            "save a tokenizer.json beside it, or install sentencepiece"
        )
    return None


def _reason(folder: Path, error: Exception) -> str:
    """Return transformers' error message in one line, without the folder's path."""
    text = " ".join(str(error).split()).replace(str(folder), "the folder")
    if "custom code" in text:
        return "its class is Python code in the model's folder, which this server does not run"
    if text.startswith("Couldn't instantiate the backend tokenizer"):
        return "it has no tokenizer.json, and its other files cannot be converted to one"
    return text[:300] or type(error).__name__


@lru_cache(maxsize=16)
def end_tokens(folder: Path) -> tuple[int, ...]:
    """Return the tokens that end a generation: those of config.json, generation_config.json and the
    tokenizer.

    They are read once.

    In many chat models, config.json still names the end token of the base model, while the chat template ends
    a turn with the tokenizer's. SGLang and vLLM stop at both.
    """
    found: list[Any] = []
    for file in ("generation_config.json", "config.json"):
        said = read_json(folder / file).get("eos_token_id")
        found += said if isinstance(said, list) else [said]
    found.append(_end_token(folder))
    if found[-1] is None and has_tokenizer(folder) and (_names_end(folder) or not any(map(_is_id, found))):
        with contextlib.suppress(
            TokenizerError
        ):  # then the tokenizer adds the token, or its class defines one
            found.append(load(folder).eos_token_id)
    return tuple(dict.fromkeys(filter(_is_id, found)))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _names_end(folder: Path) -> bool:
    files = ("tokenizer_config.json", "special_tokens_map.json")
    return any(read_json(folder / file).get("eos_token") for file in files)


def _end_token(folder: Path) -> Any:
    """Return the id of the end token named in the tokenizer's files, without loading the tokenizer."""
    config = read_json(folder / "tokenizer_config.json")
    named = config.get("eos_token")
    if "added_tokens_decoder" not in config:  # otherwise special_tokens_map.json does not count
        named = read_json(folder / "special_tokens_map.json").get("eos_token", named)
    text = named.get("content") if isinstance(named, dict) else named
    if not isinstance(text, str):
        return None
    written = read_json(folder / "tokenizer.json")
    for token in written.get("added_tokens") or []:
        if token.get("content") == text:
            return token.get("id")
    for identifier, token in (config.get("added_tokens_decoder") or {}).items():
        if isinstance(token, dict) and token.get("content") == text and identifier.isdigit():
            return int(identifier)
    vocabulary = (written.get("model") or {}).get("vocab") or read_json(folder / "vocab.json")
    if isinstance(vocabulary, list):  # a unigram model lists tokens with their scores
        return next((at for at, piece in enumerate(vocabulary) if piece[0] == text), None)
    return vocabulary.get(text, read_json(folder / "added_tokens.json").get(text))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing or is not a JSON object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
