"""Text and tokens of base models: tokenizers, chat templates, and the text of samples.

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
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..ckpt import tokenizer_files
from ..ckpt.token_bytes import TokenBytes
from .errors import BadRequest

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
    """Return whether the template accepts message content only as a list of parts.

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
    """Return the message of an error in a template, after the error's name unless the template raised it."""
    from jinja2 import TemplateError

    text = str(error)[:1000].encode(errors="replace").decode()  # a template may write lone surrogates
    if type(error) is TemplateError:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Deadline:
    """A context manager that raises RenderTooLong in its thread when the time is up."""

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
            reason = str(error).encode(errors="replace").decode()
            raise BadRequest(f"the model's tokenizer cannot encode this text: {reason}") from None

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode tokens that begin a text; `continuation` decodes those that follow others."""
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
        """Return a token as text; a part of a character as OpenAI writes it, `bytes:\\xe2\\x82`."""
        written = self.token_bytes(token)
        try:
            return written.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)

    def lengths(self, tokens: Sequence[int]) -> list[int]:
        """Return for each token the number of characters that begin in it; 0 for special tokens."""
        return [0 if token in self._special else _characters(self.token_bytes(token)) for token in tokens]

    def conversation(self, turns: list[dict[str, Any]], /, **variables: Any) -> list[int]:
        """Return the tokens of a conversation that the model continues (the text is that of `written`)."""
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


# --- the text of samples, without what ended them

_SAMPLE_CONTEXT = 64  # tokens


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
    sent: str = ""
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
        """Set the tokens of the finished sequence; return the text that was not returned before."""
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
        before = [*self.prompt[-_SAMPLE_CONTEXT:], *tokens[max(0, begin - _SAMPLE_CONTEXT) : begin]]
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
        new = text[len(self.sent) :]  # sent text cannot be taken back
        self.sent += new
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
