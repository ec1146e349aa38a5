"""Text into a base model's tokens and back, and conversations by its chat template."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from ..errors import BadRequest

_NOT_WHOLE = "�"  # what half a character is decoded as


class ChatTokenizer:
    """A folder's `tokenizer.json`, its chat template, and the tokens that end what the model says."""

    def __init__(self, folder: Path):
        """Raises BadRequest for a folder without a tokenizer."""
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception:  # the library raises nothing narrower
            raise BadRequest("this model has no tokenizer.json: send token ids instead of text") from None
        self._config = _read(folder / "tokenizer_config.json")
        self.end_tokens = end_tokens(folder)
        template = self._config.get("chat_template")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text()
        if isinstance(template, list):  # several, by name
            template = next((each["template"] for each in template if each["name"] == "default"), None)
        self._template = template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def whole_characters(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        """The text without a last character of which some bytes are still to come."""
        text = self.decode(tokens, skip_special_tokens)
        return text.rstrip(_NOT_WHOLE) if text.endswith(_NOT_WHOLE) else text

    def token(self, token: int) -> str:
        """What one token is written as."""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def conversation(self, turns: list[dict[str, Any]]) -> list[int]:
        """The tokens of a conversation that the model is to go on with. Raises BadRequest for one that the
        template does not take."""
        if self._template is None:
            raise BadRequest("this model has no chat template: use /v1/completions")
        special = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in self._config.items()
            if name.endswith("_token") and isinstance(value, (str, dict))
        }
        try:
            text = _compiled(self._template).render(messages=turns, add_generation_prompt=True, **special)
        except jinja2.TemplateError as error:
            raise BadRequest(f"messages: the model's chat template does not take them: {error}") from None
        return self.encode(text, add_special_tokens=False)  # the template has written them


@lru_cache(maxsize=16)
def end_tokens(folder: Path) -> list[int]:
    """With which the model ends what it says, as the engine reads them. Read once."""
    for file in ("generation_config.json", "config.json"):
        eos = _read(folder / file).get("eos_token_id")
        if eos is not None:
            return eos if isinstance(eos, list) else [eos]
    return []


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    """As transformers compiles chat templates: in a sandbox, with its two extensions of the language."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    return environment.from_string(template)


@lru_cache(maxsize=16)
def of_folder(folder: Path) -> ChatTokenizer:
    """Read once. Raises BadRequest."""
    return ChatTokenizer(folder)
