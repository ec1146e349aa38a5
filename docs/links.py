"""For the site: links from a page to files outside of `docs/` lead to the repository, or become text."""

from __future__ import annotations

import re
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, config: Any, **_rest: Any) -> str:
    """Rewrite the links of one page; mkdocs calls this."""
    repository = (config.repo_url or "").rstrip("/")

    def link(found: re.Match[str]) -> str:
        text, path = found.groups()
        return f"[{text}]({repository}/blob/main/{path})" if repository else text

    return _LINK.sub(link, markdown)
