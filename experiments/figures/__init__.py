"""The figures, by name: the runs that each needs, its tables and its picture.

A new one is a class in a file here, and a row in :data:`FIGURES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from experiments.figures.agd import Choices, Extremes
from experiments.figures.paper import Batches, Breadth, Deep, Rates, Sizes, Tuned
from experiments.figures.robustness import Robustness
from experiments.figures.runs import Need, Run
from experiments.figures.spectral import Horizons, ResNet, Variants
from experiments.figures.yardstick import Published, Yardstick
from experiments.tasks import Budget

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Picture


class Figure(Protocol):
    """A comparison.

    Attributes:
      published: what others found, said beside it.
    """

    published: str

    def needs(self, budget: Budget, runs: dict[str, Run]) -> list[Need]:
        """Returns the runs that it needs, as far as that can be told from those that are there."""

    def tables(self, budget: Budget, runs: dict[str, Run]) -> list[pd.DataFrame]:
        """Returns what came of those that are there."""

    def draw(self, budget: Budget, runs: dict[str, Run]) -> Picture:
        """Draws them."""


FIGURES: dict[str, Figure] = {
    "deep": Deep(),
    "rates": Rates(),
    "breadth": Breadth(),
    "tuned": Tuned(),
    "sizes": Sizes(),
    "batches": Batches(),
    "gpt": Published(),
    "yardstick": Yardstick(),
    "choices": Choices(),
    "extremes": Extremes(),
    "variants": Variants(),
    "horizons": Horizons(),
    "robustness": Robustness(),
    "resnet": ResNet(),
}
