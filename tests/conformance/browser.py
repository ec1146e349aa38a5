"""Headless Chromium, and tabs of it that watch for mistakes of a page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium here: apt install chromium"
)


@contextmanager
def running_browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def tab(browser: sync_api.Browser, url: str) -> Iterator[sync_api.Page]:
    """A tab without a key. Errors in its console, and whatever it loads from elsewhere, fail the test."""
    context = browser.new_context(base_url=url, viewport={"width": 1200, "height": 800})
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda asked: None if is_own(asked.url, url) else problems.append(asked.url))
    page.on("dialog", lambda dialog: problems.append(dialog.message) if dialog.type == "alert" else None)
    page.set_default_timeout(60_000)
    yield page
    context.close()
    assert not problems


def is_own(asked: str, url: str) -> bool:
    return asked.startswith((url, "data:", "blob:"))


def give_key(page: sync_api.Page, key: str) -> None:
    """Open the console with a key."""
    page.goto("/")
    page.fill("input[name=key]", key)
    page.keyboard.press("Enter")
    page.wait_for_selector("#state.good")
