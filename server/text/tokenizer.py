"""Tokenizers and chat templates of base models: text into tokens and back, conversations into text.

Templates come with models from the hub. transformers renders them in a sandbox; here they are also
bounded in time and length. An error in a template is answered as the request's error, never as the
server's.
"""

from __future__ import annotations

import ctypes
import json
import re
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ...ckpt import tokenizer_files
from ...ckpt.token_bytes import TokenBytes
from ..errors import BadRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5.0
CHARACTERS = 16 << 20
_OURS = {"conversation", "messages", "chat_template", "tokenize", "return_dict", "return_tensors", "padding"}
"""Arguments of `apply_chat_template` that are not variables of the template, or not for clients."""


class RenderTooLong(BaseException):
    """Interrupts a rendering whose time is up. No template can catch it."""


def rendered(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], variables: dict[str, Any]
) -> str:
    """Render a conversation with the tokenizer's chat template. Call it in a thread.

    Raises BadRequest saying what went wrong in the template, or that there is none.
    """
    if tokenizer.chat_template is None:
        raise BadRequest("this model has no chat template: use /v1/completions")
    if refused := sorted(_OURS & variables.keys()):
        raise BadRequest(f"chat_template_kwargs.{refused[0]}: not a variable that a request can set")
    if _takes_parts_only(_template(tokenizer, variables.get("tools"))):
        turns = [_in_parts(turn) for turn in turns]
    options = {"add_generation_prompt": not variables.get("continue_final_message")} | variables
    try:
        with _Deadline(SECONDS):
            text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except RenderTooLong:
        raise BadRequest(f"messages: the model's chat template ran for over {SECONDS:.0f} s") from None
    except Exception as error:  # a template can raise whatever Python can
        raise BadRequest(
            f"messages: the model's chat template refuses them: {_template_error(error)}"
        ) from None
    if len(text) > CHARACTERS:
        raise BadRequest(f"messages: the model's chat template made over {CHARACTERS} characters of them")
    return text


def _template(tokenizer: PreTrainedTokenizerBase, tools: Any) -> str:
    try:
        found = tokenizer.get_chat_template(None, tools)
    except ValueError:  # several templates without a default: rendering raises the error
        return ""
    return found if isinstance(found, str) else ""


def _takes_parts_only(template: str) -> bool:
    """Return whether the template only takes content in parts.

    It does if it loops over a message's content and never tests for a string, whose characters it would loop
    over. vLLM and SGLang look for such loops too.
    """
    return bool(_LOOP.search(template)) and not _ASKS.search(template)


_LOOP = re.compile(r"""\{%-?\s*for\s+\w+\s+in\s+\w+(\.content|\[\s*['"]content['"]\s*\])(?!\w)""")
_ASKS = re.compile(r"\bis\s+(not\s+)?(string|iterable|sequence|mapping)\b")


def _in_parts(turn: dict[str, Any]) -> dict[str, Any]:
    content = turn.get("content")
    return turn | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else turn


def _template_error(error: Exception) -> str:
    """Return an error's text. What a template raises with `raise_exception` stands alone; others begin with
    their names."""
    from jinja2 import TemplateError

    text = str(error)[:1000].encode(errors="replace").decode()  # a template may write lone surrogates
    if type(error) is TemplateError:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Deadline:
    """A context whose thread gets RenderTooLong once its seconds are up."""

    def __init__(self, seconds: float):
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._over = False
        self._timer = threading.Timer(seconds, self._interrupt)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._over = True
            _raise_in(self._thread, None)  # cancels an exception that has not been raised yet
        self._timer.cancel()

    def _interrupt(self) -> None:
        with self._lock:
            if not self._over:
                _raise_in(self._thread, RenderTooLong)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


_NOT_WHOLE = "�"  # the decoding of an incomplete character
_CONTEXT = 8  # tokens of context with which a piece of text is decoded


class ChatTokenizer:
    """A model folder's tokenizer as transformers loads it, with the tokens that end a model's turn."""

    def __init__(self, folder: Path):
        """Load the tokenizer. Raises BadRequest for a folder without one, or with one that cannot be read."""
        try:
            self._tokenizer = tokenizer_files.load(folder)
        except tokenizer_files.TokenizerError as error:
            raise BadRequest(
                f"{error}, and text cannot be read or written: /api/v1/asample takes and answers token ids"
            ) from None
        self._backend = self._tokenizer.backend_tokenizer
        self._special = frozenset(self._tokenizer.all_special_ids)
        self.token_bytes = TokenBytes(lambda: self._backend)
        """The exact bytes of a token, which may be part of a character."""
        own = self._tokenizer.eos_token_id  # the default of the tokenizer's class, if no file names another
        ends = tokenizer_files.end_tokens(folder)
        self.end_tokens = [*ends, own] if isinstance(own, int) and own not in ends else [*ends]

    def description(self) -> dict[str, Any]:
        """Return a `tokenizer.json` with all tokens, and what transformers adds to it."""
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
        """Return the tokens of a text. Raises BadRequest if the vocabulary cannot write it."""
        try:
            # The batch call lets other threads run meanwhile.
            return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except Exception as error:  # the library raises nothing narrower
            said = str(error).encode(errors="replace").decode()
            raise BadRequest(f"the model's tokenizer cannot encode this text: {said}") from None

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of tokens at the beginning of a text."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def continuation(
        self, before: Sequence[int], tokens: Sequence[int], skip_special_tokens: bool = True
    ) -> str:
        """Return the text that `tokens` add to that of the tokens `before` them.

        Decoders of sentencepiece's kind strip a space at the beginning of a text, so a sample decoded without
        its prompt would lose it.
        """
        tail: Sequence[int] = before[-_CONTEXT:]
        before_text = self.decode(tail, skip_special_tokens)
        while not before_text and len(tail) < len(before):  # none of them has text: look further back
            tail = before[-2 * len(tail) :]
            before_text = self.decode(tail, skip_special_tokens)
        whole = self.decode([*tail, *tokens], skip_special_tokens)
        for beginning in (
            before_text,
            before_text.rstrip(_NOT_WHOLE),
        ):  # the text before may end within a character
            if whole.startswith(beginning):
                return whole[len(beginning) :]
        return self.decode(tokens, skip_special_tokens)

    def matched_text(self, tokens: Sequence[int]) -> str:
        """Return the text of all tokens, including special ones, in which stop strings are searched."""
        return b"".join(map(self.token_bytes, tokens)).decode(errors="replace")

    def token(self, token: int) -> str:
        """What one token is written as; a part of a character as OpenAI writes it, `bytes:\\xe2\\x82`."""
        written = self.token_bytes(token)
        try:
            return written.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)

    def lengths(self, tokens: Sequence[int]) -> list[int]:
        """Return how many characters of the text each token begins; special tokens are not part of the
        text."""
        return [0 if token in self._special else _characters(self.token_bytes(token)) for token in tokens]

    def conversation(self, turns: list[dict[str, Any]], /, **variables: Any) -> list[int]:
        """Return the tokens of `written`."""
        return self.encode_written(self.written(turns, **variables))

    def written(self, turns: list[dict[str, Any]], /, **variables: Any) -> str:
        """Return the text of a conversation that the model continues.

        `variables` are further variables of the template, as `apply_chat_template` takes them: `tools`,
        `documents`, `enable_thinking`. Raises BadRequest for a conversation that the template refuses.
        """
        return rendered(self._tokenizer, turns, variables)

    def encode_written(self, text: str) -> list[int]:
        """Return the tokens of a template's text, including special ones. Raises BadRequest."""
        return self.encode(text, add_special_tokens=False)


def _characters(utf8: bytes) -> int:
    """Return how many characters begin in these bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in utf8)


@lru_cache(maxsize=16)
def of_folder(folder: Path) -> ChatTokenizer:
    """Return the folder's tokenizer, which is read once.

    The first call in a process takes seconds: make it in a thread. Raises BadRequest.
    """
    return ChatTokenizer(folder)
