"""Running statistics before and after, channel by channel, as cells of a table."""

from __future__ import annotations

from collections.abc import Sequence

from bntool.reports.page.cells import draw_item, number_item
from bntool.reports.page.document import Column, Item
from bntool.reports.page.strips import scale_changes, scale_sizes
from bntool.verification.statistics_shift import StatisticsShift


class ChangeColumns:
    """The columns of a table of changes, whose scales all layers share.

    Args:
        shifts: of all layers; None where it cannot be said how far one moved.
        before, after: what the two sides are called.
    """

    def __init__(self, shifts: Sequence[StatisticsShift | None], *, before: str, after: str) -> None:
        known = [shift for shift in shifts if shift is not None]
        sides = [side[1] for shift in known for side in (shift.old, shift.new) if side is not None]
        self._sizes = scale_sizes(variance for side in sides for variance in side)
        self._ratios = scale_changes(ratio for shift in known for ratio in shift.variance_ratios())
        self._distances = scale_sizes(d for shift in known for d in shift.mean_shifts() if d > _NEGLIGIBLE)
        self._before, self._after = before, after

    def columns(self) -> tuple[Column, ...]:
        """Return the columns in the order of :meth:`items`."""
        factor = f"running_var + eps, {self._after} over {self._before}, by channel"
        distance = "distance of the running_means by channel, in standard deviations"
        return (
            Column(f"running_var, {self._before}", "by channel", scale=self._sizes),
            Column(f"running_var, {self._after}", "by channel; the same colours", scale=self._sizes),
            Column("variance ratio", factor, scale=self._ratios),
            Column("worst ratio", "the one that is furthest from 1", is_number=True),
            Column("mean shift", distance, scale=self._distances),
            Column("worst shift", "the largest of these distances", is_number=True),
        )

    def items(self, shift: StatisticsShift | None) -> tuple[Item, ...]:
        """Return the cells of a layer."""
        if shift is None or shift.old is None or shift.new is None:
            ratio, worst = (None, None) if shift is None else (shift.worst_variance_ratio, shift.worst_mean_shift)
            none = draw_item((), self._sizes, what="")
            return (none, none, none, number_item(ratio, " ×"), none, number_item(worst, " σ"))
        return (
            draw_item(shift.old[1], self._sizes, what=f"running_var, {self._before},"),
            draw_item(shift.new[1], self._sizes, what=f"running_var, {self._after},"),
            draw_item(shift.variance_ratios(), self._ratios, what="variance ratio"),
            number_item(shift.worst_variance_ratio, " ×"),
            draw_item(shift.mean_shifts(), self._distances, what="mean shift in standard deviations"),
            number_item(shift.worst_mean_shift, " σ"),
        )


_NEGLIGIBLE = 1e-3  # standard deviations: so near, means are the same for a picture
