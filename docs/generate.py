"""Writes the pages that are made of the code: `python docs/generate.py`.

`settings.md` is made of the settings' docstrings, `cli.md` of the commands' help.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import typer
from tinsmith.server.cli import app
from tinsmith.server.cli.command_line import default_of
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

What `--help` says. The options of `tinsmith serve` are on a page of their own: [settings.md](settings.md).

"""


def settings_page() -> str:
    return _SETTINGS + "\n".join(_sections())


def _sections() -> Iterator[str]:
    for section in Settings.__bases__:
        title, _, rest = (inspect.getdoc(section) or "").partition(".")
        head = f"## {title.partition(' (')[0]}"
        note = (title.partition(" (")[2].rstrip(")") or rest).strip()
        yield head + "\n"
        if note:
            yield f"{note[0].upper()}{note[1:].rstrip('.')}.\n"
        yield "| setting | default | meaning |\n|---|---|---|"
        for name in section.__annotations__:
            field = section.model_fields[name]
            default = default_of(field)
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            yield f"| `{name}` | {'' if default is None else f'`{default}`'} | {meaning} |"
        yield ""


def commands_page() -> str:
    found = typer.main.get_command(app)
    return _CLI + "\n".join(_commands(found, "tinsmith")).rstrip() + "\n"


def _commands(command: object, path: str) -> Iterator[str]:
    help_ = inspect.cleandoc(getattr(command, "help", None) or "").strip()
    yield f"## {path}\n\n{help_}\n"
    options = [
        each for each in command.params if each.name not in ("help", "install_completion", "show_completion")
    ]
    if path != "tinsmith serve" and options:
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


PAGES = {"settings.md": settings_page, "cli.md": commands_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page())
