"""The table of mistakes in docs/findings.md is the recorded one, of the mistakes that there are."""

from __future__ import annotations

import json

from tests.corpus.mistakes import MISTAKES
from tests.corpus.networks import NETWORKS
from tests.documentation.corpus_table import PAGE, RECORD, render_corpus
from tests.documentation.tables import fill


def test_the_table_is_the_recorded_one() -> None:
    assert fill(PAGE, {"mistakes": render_corpus}) == PAGE.read_text()


def test_every_mistake_was_made_on_every_network() -> None:
    recorded = json.loads(RECORD.read_text())
    titles = [mistake.title for mistake in MISTAKES]
    assert list(recorded["codes"]) == titles
    assert list(recorded["networks"]) == [network.name for network in NETWORKS]
    assert all(list(results["named"]) == titles for results in recorded["networks"].values())
