"""Writes the pages that are made of the code: `python docs/generate.py`.

`settings.md` is made of the settings' docstrings, `cli.md` of the commands' help, and `api.md` of the OpenAPI
document (`api.py`).
"""

from __future__ import annotations

import inspect
import runpy
from collections.abc import Iterator
from pathlib import Path

import typer
from tinsmith.server.cli import app
from tinsmith.server.cli.command_line import default_of, title_and_note
from tinsmith.server.settings import Settings

HERE = Path(__file__).parent

_SETTINGS = """# Settings

Each setting can be given in three ways; the first of them that has a value is used:

1. as an option of `tinsmith serve`: `--max-rank 64`
2. in the environment: `TINSMITH_MAX_RANK=64`
3. in a file, which `--config FILE` or `TINSMITH_CONFIG` names:

```toml
model = ["smollm2-135m"]
port = 9000
max_rank = 64
mesh = {data = 2, fsdp = 4}
```

Lists are separated by commas in the environment, repeated as options, and lists in the file. An unknown name
is refused with the nearest right one. Times are in seconds. Sizes are bytes, or have a unit: `10GB` is
10,000,000,000 bytes, `10GiB` is 10,737,418,240.

"""

_CLI = """# Commands

What `--help` says. Every setting of [settings.md](settings.md) is an option of `tinsmith serve` and of
`tinsmith doctor`; they are left out here.

"""


def settings_page() -> str:
    return _SETTINGS + "\n".join(_sections())


def _sections() -> Iterator[str]:
    for section in Settings.__bases__:
        title, note = title_and_note(section)
        yield f"## {title}\n"
        if note:
            yield f"{note}\n"
        yield "| setting | default | meaning |\n|---|---|---|"
        for name in section.__annotations__:
            field = section.model_fields[name]
            value, _, readable = (default_of(name, field) or "").partition(" ")
            default = " ".join(filter(None, (value and f"`{value}`", readable)))
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            yield f"| `{name}` | {default} | {meaning} |"
        yield ""


def commands_page() -> str:
    found = typer.main.get_command(app)
    return _CLI + "\n".join(_commands(found, "tinsmith")).rstrip() + "\n"


def _commands(command: object, path: str) -> Iterator[str]:
    help_ = inspect.cleandoc(getattr(command, "help", None) or "").strip()
    yield f"## {path}\n\n{help_}\n"
    left_out = {"help", "install_completion", "show_completion"}
    if path in ("tinsmith serve", "tinsmith doctor"):
        left_out |= set(Settings.model_fields)
    options = [each for each in command.params if each.name not in left_out]
    if options:
        yield "| argument or option | meaning |\n|---|---|"
        for each in options:
            is_argument = each.param_type_name == "argument"
            name = (
                (each.metavar or each.name or "").upper()
                if is_argument
                else ", ".join((*each.opts, *each.secondary_opts))
            )
            meaning = " ".join((getattr(each, "help", None) or "").split()).replace("|", "\\|")
            yield f"| `{name}` | {meaning} |"
        yield ""
    for name, each in getattr(command, "commands", {}).items():
        yield from _commands(each, f"{path} {name}")


def api_page() -> str:
    return runpy.run_path(str(HERE / "api.py"))["api_page"]()


PAGES = {"settings.md": settings_page, "cli.md": commands_page, "api.md": api_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page())
