"""What all `tinsmith` commands share: mistakes are answered in one line, before anything is done."""

from __future__ import annotations

import difflib
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import typer
from pydantic import ValidationError
from pydantic_settings import BaseSettings
from typer.core import TyperGroup

S = TypeVar("S", bound=BaseSettings)

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
_PREFIX = "TINSMITH_"
_OTHERS = re.compile(
    # Read elsewhere; of the tests and notebooks; and what Kubernetes sets for a service called tinsmith.
    r"WANDB_MODE|(TEST|FUZZ|REST|NOTEBOOK|WRITE)_.*|SGLANG_(VENV|ADAPTERS|COMPARED_PERCENT)"
    r"|(.*_)?SERVICE_(HOST|PORT(_.*)?)|(.*_)?PORT_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?"
)
_SECRET = ("api_key", "sglang_api_key", "database_url")


def fail(message: str) -> NoReturn:
    typer.echo(f"tinsmith: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)


class Commands(TyperGroup):
    """Answers wrong options and arguments in one line, too."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
            if not standalone_mode:
                return code
        except _UsageError as error:
            if not standalone_mode:
                raise
            context: Any = getattr(error, "ctx", None)
            if type(error).__name__ == "NoArgsIsHelpError":
                typer.echo(context.get_help(), err=True)
            else:
                message = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
                help_ = f" ({context.command_path} --help explains it)" if context is not None else ""
                typer.echo(f"tinsmith: {message}{help_}", err=True)
            sys.exit(2)
        except typer.Abort:
            if not standalone_mode:
                raise
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


def read_settings(kind: type[S], given: Mapping[str, Any]) -> S:
    """The settings from a command's options and the environment. Ends the command if they are wrong."""
    unknown = unknown_names(os.environ)
    if unknown:
        fail("; ".join(unknown))
    try:
        return kind(**given)
    except ValidationError as error:
        fail("; ".join(_plain(problem, given) for problem in error.errors()))


def unknown_names(environment: Mapping[str, str]) -> list[str]:
    """What is wrong with the names that begin with TINSMITH_, each with the nearest setting."""
    from ..settings import Settings

    known = [_PREFIX + name.upper() for name in Settings.model_fields]
    found = []
    for name in sorted(environment):
        upper = name.upper()
        if not upper.startswith(_PREFIX) or upper in known or _OTHERS.fullmatch(upper, len(_PREFIX)):
            continue
        near = difflib.get_close_matches(upper, known, 1, cutoff=0.5)
        found.append(f"{name} is no setting" + (f"; did you mean {near[0]}?" if near else ""))
    return found


def _plain(problem: Any, given: Mapping[str, Any]) -> str:
    """A problem of pydantic's, with the option or the variable that it is about, and what was said."""
    message = problem["msg"].removeprefix("Value error, ")
    field = str(problem["loc"][0]) if problem["loc"] else ""
    if not field:
        return message
    name = f"--{field.replace('_', '-')}" if field in given else _PREFIX + field.upper()
    value = problem.get("input")
    shown = isinstance(value, (str, int, float)) and field not in _SECRET and problem["type"] != "value_error"
    return f"{name}: {repr(value)[:80]}: {message}" if shown else f"{name}: {message}"


def require_writable(folder: Path, option: str) -> None:
    """Try that files can be made in a folder, or the folder itself where it is not there yet; leaves nothing.

    Raises ValueError.
    """
    folder = folder.expanduser().absolute()
    there = folder
    while not there.exists() and not there.is_symlink():
        there = there.parent
    if not there.is_dir():
        what = "is a file" if there.exists() else "leads nowhere"
        raise ValueError(f"{option}: {there} {what}, not a folder")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".tinsmith-", dir=there))
    except OSError as error:
        what = "written to" if there == folder else f"made: {there} cannot be written to"
        raise ValueError(f"{option}: {folder} cannot be {what} ({error.strerror})") from None
