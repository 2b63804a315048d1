"""A hook of mkdocs: references in docstrings become links, and Markdown that stays as it was written is warned of.

Its Markdown is not GitHub's: lists want four spaces before what belongs to an item, blocks one word after their fence.
"""

from __future__ import annotations

import logging
import re
from typing import Any

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?([\w.]+)</code>")


def on_page_content(html: str, *, page: Any, **_: object) -> str:
    """The page with its references; a warning ends a strict build."""
    for paragraph in find_raw_markdown(html):
        logging.getLogger("mkdocs.hooks").warning("%s shows Markdown: %s", page.file.src_uri, paragraph[:80])
    return link_references(html)


def find_raw_markdown(html: str) -> list[str]:
    """Paragraphs in which a list, a table, a block or a link is left as it was written."""
    found = []
    for paragraph in re.findall(r"<p>(.*?)</p>", html, flags=re.DOTALL):
        text = re.sub(r"<[^>]+>", "", re.sub(r"<code>.*?</code>", "", paragraph, flags=re.DOTALL))
        if "```" in paragraph or re.search(r"^\s*([-*] |\d+\. |\|.*\|\s*$)|\*\*|\]\(", text, flags=re.MULTILINE):
            found.append(paragraph)
    return found


def link_references(html: str) -> str:
    """The page with references that are links where it has their target, and code elsewhere.

    The last part of their names is shown, of modules the whole name.
    """
    headings = set(re.findall(r'id="(bntool[\w.]*)"', html))
    by_name = {target.rpartition(".")[2]: target for target in headings}

    def link(found: re.Match[str]) -> str:
        path = found[1]
        name = path if found[0].startswith(":mod:") else path.rpartition(".")[2]
        target = path if path in headings else by_name.get(name)
        return f"<code>{name}</code>" if target is None else f'<a href="#{target}"><code>{name}</code></a>'

    return _ROLE.sub(link, html)
