"""The styles and marks by which every rendering shows how bad a finding or a verdict is."""

from __future__ import annotations

from bntool.inspection.findings import Severity
from bntool.inspection.verdict import Health
from bntool.reports.blocks import Style

SEVERITY_STYLES = {Severity.NOTICE: Style.NOTICE, Severity.WARNING: Style.WARNING, Severity.ERROR: Style.ERROR}
MARKS = {Severity.NOTICE: "i", Severity.WARNING: "!", Severity.ERROR: "X"}
HEALTH_STYLES = {
    Health.HEALTHY: Style.GOOD,
    Health.SUSPICIOUS: Style.WARNING,
    Health.SICK: Style.ERROR,
    Health.NO_BATCH_NORM: Style.NOTICE,
    Health.NOT_JUDGED: Style.WARNING,
}
