"""Was it luck? Differences between initialisations, and how far other photos and seeds might move them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from siamese_detr.comparison.summary import CellResult, percent_of

Cell = tuple[str, float, int]
"""Initialisation, label fraction and seed."""


@dataclass(frozen=True)
class Difference:
    """How much better one initialisation is than another, in AP as a fraction of 1.

    Args:
        init, against: which, and than which.
        fraction: of the labels.
        mean: over the seeds that both have.
        low, high: 95 % interval over other draws of validation images and seeds.
        by_seed: the difference for each seed.
    """

    init: str
    against: str
    fraction: float
    mean: float
    low: float
    high: float
    by_seed: dict[int, float]

    def __str__(self) -> str:
        numbers = f"{100 * abs(self.mean):.1f} AP [{{:.1f}}, {{:.1f}}]"
        at = f"at {percent_of(self.fraction)} of the labels"
        if self.low > 0:
            return f"{self.init} adds {numbers.format(100 * self.low, 100 * self.high)} to {self.against} {at}"
        if self.high < 0:
            return f"{self.init} costs {numbers.format(-100 * self.high, -100 * self.low)} against {self.against} {at}"
        interval = f"{100 * self.mean:+.1f} AP [{100 * self.low:.1f}, {100 * self.high:.1f}]"
        return f"{self.init} and {self.against} {at}: no difference that these photos can show ({interval})"


def differences(cells: Sequence[CellResult], resampled: Mapping[Cell, np.ndarray]) -> list[Difference]:
    """Every initialisation against the first, and against those that were only fine-tuned longer.

    A paired bootstrap: both detectors are measured on the same draws of validation images, and the seeds, which choose
    the labelled images and the new weights for both alike, are drawn with replacement, too.

    Args:
        cells: of the comparison.
        resampled: APs on the same draws of validation images, of the cells that have them.
    """
    aps = {(cell.init, cell.fraction, cell.seed): cell.metrics.get("AP") for cell in cells if cell.status == "done"}
    inits = list(dict.fromkeys(cell.init for cell in cells))
    references = [init for n, init in enumerate(inits) if n == 0 or init.endswith("+longer")]
    made = []
    for fraction in sorted({cell.fraction for cell in cells}):
        for against in references:
            for init in inits:
                pairs: dict[int, tuple[float, np.ndarray]] = {}
                for seed in dict.fromkeys(cell.seed for cell in cells):
                    one, other = (init, fraction, seed), (against, fraction, seed)
                    a, b = aps.get(one), aps.get(other)
                    if a is not None and b is not None and one in resampled and other in resampled:
                        pairs[seed] = (a - b, resampled[one] - resampled[other])
                if pairs and init not in references[: references.index(against) + 1]:
                    by_seed = {seed: own for seed, (own, _) in pairs.items()}
                    low, high = interval(np.array([drawn for _, drawn in pairs.values()]))
                    mean = float(np.mean(list(by_seed.values())))
                    made.append(Difference(init, against, fraction, mean, low, high, by_seed))
    return made


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the means over seeds drawn with replacement.

    Args:
        drawn: (seeds, draws) differences on each draw of the validation images.
    """
    seeds, draws = drawn.shape
    chosen = np.random.default_rng(0).integers(seeds, size=(seeds, draws))
    low, high = np.nanquantile(np.take_along_axis(drawn, chosen, 0).mean(0), (0.025, 0.975))
    return float(low), float(high)


def luck_lines(found: Sequence[Difference]) -> list[str]:
    """The answer in sentences, and how to read them; none without differences."""
    if not found:
        return []
    seeds = min(len(difference.by_seed) for difference in found)
    luck = f"other seeds than these {seeds}" if seeds > 1 else "not over other seeds: there was one"
    return [*map(str, found), f"[ ]: 95 % interval over other validation photos like these, and {luck}."]
