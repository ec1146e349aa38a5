"""Every command in the documentation is one that there is, with options that it takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tinsmith
import typer
from tinsmith.server.cli import app
from tinsmith.server.cli.command_line import unknown_names

ROOT = Path(tinsmith.__file__).resolve().parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.name for page in PAGES]
_OF_TESTS = {"TINSMITH_", "TINSMITH_DEMO_STEPS"}


def blocks(page: Path) -> list[str]:
    """Code without a language, or of a shell, with continued lines joined."""
    fenced = re.findall(r"^```([^\n`]*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    found = [block for language, block in fenced if language in ("", "sh", "bash", "console")]
    return [block.replace("\\\n", " ") for block in found]


def tinsmith_commands(page: Path) -> list[str]:
    """Return the commands of a page's code blocks and of code within its text."""
    text = page.read_text()
    inline = re.findall(r"`((?:\.venv/bin/)?tinsmith [a-z][^`]*)`", re.sub(r"\s*\n\s*", " ", text))
    lines = [line for block in blocks(page) for line in block.splitlines()]
    lines = [line for line in lines if not line.startswith("tinsmith: ")]  # what a command answered
    found = [*inline, *(match[0] for line in lines for match in _COMMAND.finditer(line.partition("#")[0]))]
    return [re.sub(r"^.*?tinsmith ", "", each) for each in found]


_COMMAND = re.compile(
    r"(?<![\w/.-])(?:\.venv/bin/)?tinsmith (?:serve|plan|keys|models|checkpoints|version)[^);|&]*"
)


def parse(command: str) -> None:
    """Find the command and its options, without running it."""
    arguments = shlex.split(command)
    found, context = typer.main.get_command(app), None
    while hasattr(found, "resolve_command") and arguments:
        context = found.make_context("tinsmith", arguments[:1], parent=context)
        _, found, arguments = found.resolve_command(context, arguments)
    known = {name for parameter in found.params for name in parameter.opts}
    for word in arguments:
        if word.startswith("--"):
            assert word.partition("=")[0] in {*known, "--help"}, f"tinsmith {command}: no option {word}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_tinsmith_s_commands_take_their_options(page: Path) -> None:
    for command in tinsmith_commands(page):
        parse(command)


def test_a_command_that_is_not_there_would_be_noticed() -> None:
    with pytest.raises(AssertionError, match="no option --modle"):
        parse("serve --modle x")
    with pytest.raises(Exception, match="No such command"):
        parse("server --model x")
    assert "serve --model smollm2-135m --data-dir runs" in tinsmith_commands(ROOT / "docs/quickstart.md")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_targets_files_and_settings_are_there(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line.strip() for block in blocks(page) for line in block.splitlines()]
    code = [*lines, *re.findall(r"`([^`\n]+)`", text)]
    for line in code:
        if (made := re.match(r"make ([a-z-]+)", line)) is not None:
            assert made[1] in targets, line
        for file in re.findall(r"(?<![\w/.-])(?:demo|bench|tests|deploy|notebooks)/[\w/.-]+\.\w+", line):
            assert (ROOT / file).exists() or not line.startswith((".venv/bin/python", "python", "docker")), (
                line
            )
    variables = set(re.findall(r"\bTINSMITH_[A-Z_]*", text)) - _OF_TESTS
    assert not unknown_names(dict.fromkeys(variables, ""))
