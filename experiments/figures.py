"""The figures: which runs each needs, its table and its picture. A new one is a class here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from experiments import tasks
from experiments.optimizers import OPTIMIZERS
from experiments.runner import key_of
from experiments.store import name
from experiments.tasks import Budget, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Run = dict[str, Any]

# The same colour for the same optimiser in every figure.
COLOURS = dict(
    zip(
        OPTIMIZERS,
        (
            *("#d62728", "#7f7f7f", "#aec7e8", "#1f77b4", "#98df8a", "#2ca02c", "#9467bd"),
            *("#c5b0d5", "#ff7f0e", "#8c564b", "#e377c2"),
        ),
        strict=True,
    )
)


class Need(NamedTuple):
    """A run that a figure needs."""

    task: Task
    optimizer: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the run in the store."""
        return name(key_of(*self))


class Figure(Protocol):
    """A comparison.

    Attributes:
      published: what others found, said beside it.
    """

    published: str

    def needs(self, budget: Budget, runs: dict[str, Run]) -> list[Need]:
        """Returns the runs that it needs, as far as that can be told from those that are there."""

    def table(self, budget: Budget, runs: dict[str, Run]) -> str:
        """Returns what came of it, as a table of Markdown."""

    def draw(self, budget: Budget, runs: dict[str, Run], file: Path) -> None:
        """Draws it as a PNG."""


def final(run: Run) -> float:
    """Returns the last validation loss, infinite for a run that diverged."""
    loss: float = run["validation"][-1][1]
    return math.inf if run["diverged"] or math.isnan(loss) else loss


def tuned(task: Task, optimizer: str, seeds: Sequence[int], runs: dict[str, Run]) -> list[Need]:
    """Returns the runs of a grid with the first seed, and of its best rate with the others.

    The latter once the grid is there.
    """
    grid = [Need(task, optimizer, rate, seeds[0]) for rate in OPTIMIZERS[optimizer].rates]
    if any(need.name not in runs for need in grid):
        return grid
    best = min(grid, key=lambda need: final(runs[need.name]))
    return [*grid, *(best._replace(seed=seed) for seed in seeds[1:])]


def best_runs(task: Task, optimizer: str, seeds: Sequence[int], runs: dict[str, Run]) -> list[Run]:
    """Returns the runs of the best rate, as far as they are there, the first seed's first."""
    needs = [need for need in tuned(task, optimizer, seeds, runs) if need.name in runs]
    if not needs:
        return []
    rate = min(needs, key=lambda need: final(runs[need.name])).rate
    return [runs[need.name] for need in needs if need.rate == rate]


class Yardstick:
    """Steps and seconds to the final validation loss of the best tuned AdamW with cosine decay."""

    published = "Nothing: this is our own comparison."
    reference = "adamw_cosine"
    seeds = (0, 1, 2)

    def needs(self, budget: Budget, runs: dict[str, Run]) -> list[Need]:
        """Returns the grid of each optimiser on each task, and three seeds of the best rate."""
        return [
            need
            for task in self.tasks(budget)
            for optimizer in OPTIMIZERS
            for need in tuned(task, optimizer, self.seeds, runs)
        ]

    def tasks(self, budget: Budget) -> Iterable[Task]:
        """Returns the five tasks."""
        return (tasks.create(name, budget) for name in tasks.TASKS)

    def target(self, task: Task, runs: dict[str, Run]) -> float:
        """Returns the validation loss that is to be reached, NaN if it is not there yet."""
        found = best_runs(task, self.reference, self.seeds, runs)
        return statistics.fmean(map(final, found)) if found else math.nan

    def table(self, budget: Budget, runs: dict[str, Run]) -> str:
        """Returns a row for each task and optimiser, and the geometric means over the tasks."""
        rows = [
            "| task | optimiser | rate | validation loss | accuracy | steps to AdamW's | seconds |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        ratios: dict[str, list[float]] = {optimizer: [] for optimizer in OPTIMIZERS}
        for task in self.tasks(budget):
            target = self.target(task, runs)
            for optimizer, entry in OPTIMIZERS.items():
                found = best_runs(task, optimizer, self.seeds, runs)
                if not found:
                    continue
                losses = list(map(final, found))
                if math.isfinite(target):
                    ratios[optimizer].append(statistics.fmean(losses) / target)
                reached = [first(run, target) for run in found]
                there = [point for point in reached if point]
                steps = f"{statistics.fmean(p[0] for p in there):,.0f}" if there else "not reached"
                seconds = f"{statistics.fmean(p[3] for p in there):.1f}" if there else ""
                if 0 < len(there) < len(found):
                    steps += f" ({len(there)} of {len(found)})"
                accuracy = statistics.fmean(run["validation"][-1][2] for run in found)
                rate = f"{found[0]['key']['rate']:g}" if len(entry.rates) > 1 else ""
                rows.append(
                    f"| {task.name} | {optimizer} | {rate} | {with_range(losses)} | "
                    f"{accuracy:.1%} | {steps} | {seconds} |"
                )
        rows += [
            "",
            "| optimiser | loss, of AdamW's (geometric mean) | tasks |",
            "| --- | --- | --- |",
        ]
        for optimizer, found_ratios in ratios.items():
            if found_ratios:
                mean = math.exp(statistics.fmean(map(math.log, found_ratios)))
                rows.append(f"| {optimizer} | {mean:.3f} | {len(found_ratios)} |")
        return "\n".join(rows)

    def draw(self, budget: Budget, runs: dict[str, Run], file: Path) -> None:
        """Draws the validation losses of all optimisers against steps, a panel for each task."""
        from matplotlib.figure import Figure as Canvas

        names = list(tasks.TASKS)
        canvas = Canvas(figsize=(4 * len(names), 4), layout="constrained")
        for task, axes in zip(self.tasks(budget), canvas.subplots(1, len(names)), strict=True):
            target = self.target(task, runs)
            for optimizer in OPTIMIZERS:
                draw_curves(axes, optimizer, best_runs(task, optimizer, self.seeds, runs))
            if math.isfinite(target):
                axes.axhline(target, color=COLOURS[self.reference], linewidth=0.8, linestyle=":")
                axes.set_ylim(0.9 * target, 2 * target)
            axes.set(title=task.name, xlabel="step", ylabel="validation loss")
        handles, labels = canvas.axes[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
        canvas.savefig(file, dpi=110)


def first(run: Run, target: float) -> list[float] | None:
    """Returns the first validation of a run at or below a loss, if there is one."""
    return next((point for point in run["validation"] if point[1] <= target), None)


def with_range(values: Sequence[float]) -> str:
    """Returns the mean, and the range if there are several."""
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def draw_curves(axes: Axes, optimizer: str, found: Sequence[Run]) -> None:
    """Draws the validation loss of the runs of an optimiser, the first one named."""
    for number, run in enumerate(found):
        steps, losses, *_ = zip(*run["validation"], strict=True)
        label = optimizer.replace("_", " ") if number == 0 else None
        width = 2 if optimizer == "agd" else 1.2
        axes.plot(steps, losses, color=COLOURS[optimizer], linewidth=width, label=label)


FIGURES: dict[str, Figure] = {"yardstick": Yardstick()}
