"""Ending a run when the held-out loss no longer falls. Imports no torch."""

import math
from dataclasses import dataclass

from finetune.recipe.sections import Train


@dataclass
class EarlyStopping:
    """What a run remembers between evaluations; it is in every checkpoint."""

    lowest: float | None = None  # held-out loss that later ones must be below
    without: int = 0  # evaluations in a row without enough improvement on it

    def see(self, loss: float, train: Train) -> None:
        """Take a measured held-out loss into account; every rank has the same one."""
        if math.isfinite(loss) and (self.lowest is None or loss < self.lowest - train.early_stopping_threshold):
            self.lowest, self.without = loss, 0
        elif self.lowest is not None:
            self.without += 1

    def reason(self, train: Train) -> str | None:
        """Why the run ends now, or None."""
        if not train.early_stopping_patience or self.without < train.early_stopping_patience or self.lowest is None:
            return None
        better = f" by more than {train.early_stopping_threshold:g}" if train.early_stopping_threshold else ""
        return (
            f"early stopping: no held-out loss below {self.lowest:.4f}{better} in {self.without}"
            f" evaluation{'s' if self.without > 1 else ''} in a row"
        )
