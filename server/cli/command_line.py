"""Parsing and errors of all `tinsmith` commands: mistakes are answered in one line, before anything else."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin

import rich.progress
import typer
from pydantic import BeforeValidator, ByteSize, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from typer.core import TyperGroup

from ...ckpt.package_index import Progress
from ..settings import Settings, default_cache_dir, read_size

S = TypeVar("S", bound=BaseSettings)

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
_PREFIX = "TINSMITH_"
_CONFIG = "TINSMITH_CONFIG"
_OTHERS = re.compile(
    # Names for clients, other programs, tests and notebooks, or set by Kubernetes for a service of our name.
    r"URL|WANDB_MODE|(TEST|FUZZ|REST|NOTEBOOK|WRITE)_.*|SGLANG_(VENV|ADAPTERS|COMPARED_PERCENT)"
    r"|(.*_)?SERVICE_(HOST|PORT(_.*)?)|(.*_)?PORT_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?"
)
_UNITS = {"days": 86_400, "hours": 3600, "minutes": 60}  # in seconds
_SECRET = ("api_key", "sglang_api_key", "database_url")


def fail(message: str) -> NoReturn:
    typer.echo(f"tinsmith: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)


def address(host: str, port: int) -> str:
    """Return the URL at which this machine reaches a server that listens there."""
    host = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Bars(Progress):
    """Reports downloads as bars on a terminal."""

    @contextmanager
    def download(self, name: str, size: int | None) -> Iterator[Callable[[int], None]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with rich.progress.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(name, total=size)
            yield lambda so_far: bars.update(task, completed=so_far)


def progress_of_downloads(say: Callable[[str], object]) -> Progress:
    """Return bars if standard error is a terminal, and otherwise lines, which `say` gets."""
    return Bars(say) if Console(stderr=True).is_terminal else Progress(say)


class Commands(TyperGroup):
    """A group of commands that answers wrong options and arguments in one line."""

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


@contextmanager
def waiting(doing: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done, and on a terminal for how long. The block calls what it gets with the reasons
    why it is not done yet."""
    console = Console(stderr=True, emoji=False, markup=False)
    if not console.is_terminal:
        reasons = {""}
        typer.echo(doing, err=True)

        def line(reason: str) -> None:
            if reason not in reasons:
                typer.echo(f"waiting; the engine: {reason}", err=True)
                reasons.add(reason)

        yield line
        return
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with rich.progress.Progress(*columns, console=console) as shown:
        task = shown.add_task(doing)
        yield lambda reason: shown.update(task, description=f"{doing}: {reason}")
        shown.update(task, description=doing)


Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.toml",
        help="A file with settings, such as `port = 9000`. Options and the environment override it.",
    ),
]


def takes_settings(
    kind: type[BaseSettings], **own: tuple[Any, Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each setting of `kind`, with the setting's docstring as its help.

    The command is called with those that were given. `own`: further options, each with its type and default.
    """
    own = {"config": (Config, None)} | own
    parameters = [
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=each)
            for name, (each, default) in own.items()
        ),
        *(_parameter(section, name) for section in kind.__bases__ for name in section.__annotations__),
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def with_those_given(**values: Any) -> None:
            command(**{name: value for name, value in values.items() if value not in (None, [])})

        with_those_given.__name__ = command.__name__
        with_those_given.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_those_given.__annotations__ = {each.name: each.annotation for each in parameters}
        return with_those_given

    return decorate


def _parameter(section: type[BaseSettings], name: str) -> inspect.Parameter:
    field = section.model_fields[name]
    kind: Any = field.annotation
    if isinstance(kind, UnionType):
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    option = f"--{name.replace('_', '-')}"
    help_ = " ".join((field.description or "").split())
    if get_origin(kind) is list:
        kind = list[str]
        help_ += " Repeatable."
    elif kind not in (bool, int, float, Path) or name.endswith("_bytes"):  # sizes have units
        kind = str
    names = [f"{option}/--no-{option[2:]}"] if kind is bool else [option]
    if (default := default_of(name, field)) is not None:
        help_ += f" [default: {default}]"
    setting_option = typer.Option(*names, help=help_, rich_help_panel=title_and_note(section)[0])
    annotation: Any = Annotated[kind | None, setting_option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def title_and_note(section: type[BaseSettings]) -> tuple[str, str]:
    """Return the first sentence of a section's docstring, without its full stop, and the others."""
    title, _, note = " ".join((section.__doc__ or "").split()).partition(". ")
    return title.rstrip("."), note


def default_of(name: str, field: FieldInfo) -> str | None:
    """Return a setting's default as it would be written, with a readable form of long times in brackets.

    Returns None if it has no default.
    """
    if field.default_factory is default_cache_dir:
        return "~/.cache/tinsmith"
    default = field.default
    if field.default_factory is not None or default is None:
        return None
    if any(isinstance(each, BeforeValidator) and each.func is read_size for each in field.metadata):
        return ByteSize(default).human_readable(separator="").replace(".0", "")
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float) and default.is_integer():
        default = int(default)
    if name.endswith("_seconds"):
        for unit, seconds in _UNITS.items():
            if default >= 2 * seconds and default % seconds == 0:
                return f"{default} ({default // seconds} {unit})"
    return f"{default}"


def read_settings(kind: type[S], given: Mapping[str, Any], config: Path | None = None) -> S:
    """Read settings from a command's options, the environment and a file. Ends the command if they are wrong.

    The file may have settings that `kind` does not have.
    """
    if unknown := unknown_names(os.environ):
        fail("; ".join(unknown))
    there = {name.upper() for name in os.environ}
    config = config or (Path(os.environ[_CONFIG]) if os.environ.get(_CONFIG) else None)
    in_file = {} if config is None else _settings_of(config)
    from_file = {
        name: value
        for name, value in in_file.items()
        if name in kind.model_fields and _PREFIX + name.upper() not in there and name not in given
    }
    try:
        return kind(**from_file, **given)
    except ValidationError as error:
        places = {name: f"--{name.replace('_', '-')}" for name in given}
        places |= {name: f"{config}: {name}" for name in from_file}
        fail("; ".join(_plain(problem, places) for problem in error.errors()))


def _settings_of(config: Path) -> dict[str, Any]:
    """Read a file of settings. Ends the command if it cannot be read or has unknown names."""
    try:
        found = tomllib.loads(config.read_text("utf-8"))
    except OSError as error:
        fail(f"--config: {config} cannot be read ({error.strerror})")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        fail(f"--config: {config} is not TOML: {error}")
    known = list(Settings.model_fields)
    wrong = [
        f"{config}: {name} is not a setting{_nearest(name, known)}" for name in found if name not in known
    ]
    if wrong:
        fail("; ".join(wrong))
    return found


def unknown_names(environment: Mapping[str, str]) -> list[str]:
    """Return an error for each unknown name that begins with TINSMITH_, with the nearest setting."""
    known = [_PREFIX + name.upper() for name in Settings.model_fields]
    found = []
    for name in sorted(environment):
        upper = name.upper()
        others = upper == _CONFIG or _OTHERS.fullmatch(upper, len(_PREFIX))
        if upper.startswith(_PREFIX) and upper not in known and not others:
            found.append(f"{name} is not a setting{_nearest(upper, known)}")
    return found


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _plain(problem: Any, places: Mapping[str, str]) -> str:
    """Return pydantic's error with the place of the value, and the value unless it is secret."""
    message = problem["msg"].removeprefix("Value error, ")
    field = str(problem["loc"][0]) if problem["loc"] else ""
    if not field:
        return message
    name = places.get(field, _PREFIX + field.upper())
    value = problem.get("input")
    shown = isinstance(value, (str, int, float)) and field not in _SECRET and problem["type"] != "value_error"
    return f"{name}: {repr(value)[:80]}: {message}" if shown else f"{name}: {message}"


def require_writable(folder: Path, option: str) -> None:
    """Check that files can be made in a folder, or that a missing folder can be made; leaves nothing behind.

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
