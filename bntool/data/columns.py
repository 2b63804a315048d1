"""Choosing the columns of data that hold the inputs and the labels: named by the user, or found."""

from __future__ import annotations

from dataclasses import dataclass

from bntool.errors import UsageError

INPUT_KEYS = ("images", "image", "inputs", "input", "x", "data", "pixel_values", "features", "arr_0")
LABEL_KEYS = ("labels", "label", "y", "targets", "target", "classes")
_NONE = "none"


@dataclass(frozen=True)
class Columns:
    """Names of columns: of arrays in a file, of files of a sample in a tar archive, of columns of a dataset.

    Attributes:
        inputs: None where they are to be found.
        labels: the same; ``none`` where there are to be none.
    """

    inputs: str | None = None
    labels: str | None = None

    @property
    def without_labels(self) -> bool:
        """Whether the user says that there are no labels."""
        return self.labels is not None and self.labels.lower() == _NONE

    @property
    def named(self) -> tuple[str, ...]:
        """The names that must be there."""
        return tuple(name for name in (self.inputs, self.labels) if name is not None and name.lower() != _NONE)

    def refuse_names(self, spec: str, *, what: str) -> None:
        """Refuse names of columns for data that have none.

        Raises:
            UsageError: there are some; ``--labels none`` is none.
        """
        if self.named:
            raise UsageError(
                f"--inputs and --labels name columns, and {what}; --labels none says that there are no labels",
                path=spec,
            )


FOUND = Columns()
