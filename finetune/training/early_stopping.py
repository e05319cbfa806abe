"""Early stopping: ends a run when the held-out loss no longer falls. Imports no torch."""

import math
from dataclasses import dataclass

from finetune.recipe.sections import Train


@dataclass
class EarlyStopping:
    """State of early stopping between evaluations, stored in every checkpoint."""

    lowest: float | None = None  # best held-out loss, the reference for later ones
    without: int = 0  # consecutive evaluations that did not improve on it enough

    def see(self, loss: float, train: Train) -> None:
        """Update the state with a held-out loss, which is the same on every rank."""
        if math.isfinite(loss) and (self.lowest is None or loss < self.lowest - train.early_stopping_threshold):
            self.lowest, self.without = loss, 0
        elif self.lowest is not None:
            self.without += 1

    def reason(self, train: Train) -> str | None:
        """Why the run must end now; None if it continues."""
        if not train.early_stopping_patience or self.without < train.early_stopping_patience or self.lowest is None:
            return None
        better = f" by more than {train.early_stopping_threshold:g}" if train.early_stopping_threshold else ""
        return (
            f"early stopping: no held-out loss below {self.lowest:.4f}{better} in {self.without}"
            f" evaluation{'s' if self.without > 1 else ''} in a row"
        )
