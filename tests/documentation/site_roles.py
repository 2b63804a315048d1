"""A hook of mkdocs: references in docstrings become links where the page has their target, and code elsewhere."""

from __future__ import annotations

import re

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?([\w.]+)</code>")


def on_page_content(html: str, **_: object) -> str:
    """The page with its references; the last part of their names is shown, of modules the whole name."""
    headings = set(re.findall(r'id="(bntool[\w.]*)"', html))
    by_name = {target.rpartition(".")[2]: target for target in headings}

    def link(found: re.Match[str]) -> str:
        path = found[1]
        name = path if found[0].startswith(":mod:") else path.rpartition(".")[2]
        target = path if path in headings else by_name.get(name)
        return f"<code>{name}</code>" if target is None else f'<a href="#{target}"><code>{name}</code></a>'

    return _ROLE.sub(link, html)
