"""Write the tables of docs/folding.md from what was recorded: ``python -m tests.documentation.folding_tables``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.documentation.tables import fill, render_table
from tests.places import INTEROP, ROOT

PAGE = ROOT / "docs" / "folding.md"
RECORDED = INTEROP


def render_tools() -> str:
    """What other tools make of networks that must not be folded, or only with care."""
    answers: dict[str, dict[str, str]] = json.loads((RECORDED / "folding_tools.json").read_text())
    tools = list(next(iter(answers.values())))
    rows = [[title, *(_emphasise(given[tool]) for tool in tools)] for title, given in answers.items()]
    return render_table(["network", *tools], rows)


def _emphasise(answer: str) -> str:
    return f"**{answer}**" if answer.startswith("wrong") else answer


def render_zoo() -> str:
    """Who folds how much of torchvision and timm, and where bntool's folds go."""
    zoo: dict[str, Any] = json.loads((RECORDED / "fold_zoo.json").read_text())
    total = zoo["batchnorms"]
    tools = [
        [
            name,
            f"{counts['folded']:,} ({_percent(counts['folded'], total)})",
            f"{counts['folded_right']:,} ({_percent(counts['folded_right'], total)})",
            str(counts["wrong"]),
            str(counts["fails"]),
        ]
        for name, counts in zoo["tools"].items()
    ]
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in zoo["reasons"].items())
    not_judged = "; ".join(f"{status}: {len(names)}" for status, names in zoo["not_judged"].items())
    head = ["tool", "BNs folded", "of which in models that stay right", "models wrong", "models it fails on"]
    counted = (
        f"{zoo['models']} architectures with {total:,} BatchNorm layers were folded; {zoo['without_batchnorm']} more "
        f"that were drawn have none. Not judged: {not_judged or 'none'}."
    )
    levels = render_table(["bntool", "BNs", "together"], list(_levels(zoo["levels"], total)))
    return "\n\n".join([counted, render_table(head, tools), levels, f"Left alone: {reasons}."])


def _levels(levels: dict[str, int], total: int) -> Iterator[list[str]]:
    together = 0
    groups = (("direct", ("direct",)), ("+ through and norm", ("through", "norm")), ("+ forward", ("forward",)))
    for title, names in groups:
        count = sum(number for level, number in levels.items() if level.partition("/")[0] in names)
        together += count
        yield [title, f"{count:,}", _percent(together, total)]


def render_families() -> str:
    """How much is folded of each family that was run, with scales of both signs and of one."""
    families: dict[str, dict[str, Any]] = json.loads((RECORDED / "fold_zoo_families.json").read_text())
    rows, totals = [], [0] * 7
    for family, facts in families.items():
        mixed, positive = facts["runs"]["mixed"], facts["runs"]["positive"]
        counts = [
            len(facts["architectures"]),
            facts["batchnorms"],
            mixed["bntool"]["folded"],
            positive["bntool"]["folded"],
            sum(run["bntool"][verdict] for run in (mixed, positive) for verdict in ("wrong", "fails")),
            mixed["torch.fx"]["folded_right"],
            mixed["mmcv"]["folded_right"],
        ]
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        rows.append([family, *map(str, counts)])
    _, batchnorms, *_ = totals
    shares = [
        str(totals[4]) if at == 4 else f"{totals[at]:,} ({_percent(totals[at], batchnorms)})" for at in range(2, 7)
    ]
    rows.append(["all of these", str(totals[0]), f"{batchnorms:,}", *shares])
    head = ["family", "architectures", "BNs", "30 % negative", "positive", "wrong or failing", "torch.fx", "mmcv"]
    return render_table(head, rows)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %"


TABLES = {"folding-tools": render_tools, "fold-zoo": render_zoo, "fold-zoo-families": render_families}


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE, TABLES))
