"""A conversation as the model's chat template writes it, rendered by transformers.

Templates come with models from the hub. transformers renders them in a sandbox; here they are also bounded
in time and length. Whatever goes wrong in one is the request's error, never the server's.
"""

from __future__ import annotations

import ctypes
import re
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import BadRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5.0
CHARACTERS = 16 << 20
_OURS = {"conversation", "messages", "chat_template", "tokenize", "return_dict", "return_tensors", "padding"}
"""What `apply_chat_template` takes that is not a variable of the template, or not the client's to say."""


class RenderTooLong(BaseException):
    """Raised within a rendering whose time is up. No template can catch it."""


def rendered(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], variables: dict[str, Any]
) -> str:
    """Call it in a thread of its own. Raises BadRequest saying what the template, or the lack of one, did."""
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
        raise BadRequest(f"messages: the model's chat template does not take them: {_said(error)}") from None
    if len(text) > CHARACTERS:
        raise BadRequest(f"messages: the model's chat template made over {CHARACTERS} characters of them")
    return text


def _template(tokenizer: PreTrainedTokenizerBase, tools: Any) -> str:
    try:
        found = tokenizer.get_chat_template(None, tools)
    except ValueError:  # several, and none is the default: rendering says so
        return ""
    return found if isinstance(found, str) else ""


def _takes_parts_only(template: str) -> bool:
    """Whether it loops over the parts of a message's content and never asks if that is a string: it would
    loop over the characters of one. vLLM and SGLang look for such loops, too."""
    return bool(_LOOP.search(template)) and not _ASKS.search(template)


_LOOP = re.compile(r"""\{%-?\s*for\s+\w+\s+in\s+\w+(\.content|\[\s*['"]content['"]\s*\])(?!\w)""")
_ASKS = re.compile(r"\bis\s+(not\s+)?(string|iterable|sequence|mapping)\b")


def _in_parts(turn: dict[str, Any]) -> dict[str, Any]:
    content = turn.get("content")
    return turn | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else turn


def _said(error: Exception) -> str:
    """What a template raises with `raise_exception` stands alone; other errors begin with their names."""
    from jinja2 import TemplateError

    text = str(error)[:1000].encode(errors="replace").decode()  # a template may write lone surrogates
    if type(error) is TemplateError:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Deadline:
    """Raises RenderTooLong in the thread that entered it, once its seconds are up."""

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
            _raise_in(self._thread, None)  # one that is still to come
        self._timer.cancel()

    def _interrupt(self) -> None:
        with self._lock:
            if not self._over:
                _raise_in(self._thread, RenderTooLong)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)
