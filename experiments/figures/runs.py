"""What figures share: the runs they need, the best rate, rows of tables and curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.optimizers import OPTIMIZERS
from experiments.runner import key_of
from experiments.store import name
from experiments.tasks import Budget, Task, create

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

Run = dict[str, Any]

# How often a grid grows beyond an end at which its best rate lies.
LONGEST_GRID = 9
# The same colour for the same optimiser in every figure.
COLOURS = {
    "agd": "#d62728",
    "agd_tensors": "#67000d",
    "agd_mass_one": "#bcbd22",
    "agd_own_start": "#fc9272",
    "agd_averaged": "#e7969c",
    "agd_spectral": "#e6ab02",
    "agd_spectral_averaged": "#000000",
    "sgd": "#7f7f7f",
    "adam": "#17becf",
    "adamw": "#aec7e8",
    "adamw_cosine": "#1f77b4",
    "muon": "#98df8a",
    "muon_cosine": "#2ca02c",
    "schedule_free_adamw": "#9467bd",
    "schedule_free_muon": "#c5b0d5",
    "prodigy": "#ff7f0e",
    "dowg": "#8c564b",
    "mechanic": "#e377c2",
}
# Those that all others are compared with: their curves are thick, and on top.
MAIN = ("agd", "agd_spectral_averaged", "adamw_cosine", "muon_cosine")


def five_tasks(budget: Budget) -> list[Task]:
    """Returns the tasks of our own comparisons."""
    return [create(name, budget) for name in ("fcn", "mlp", "cnn", "vit", "gpt")]


class Need(NamedTuple):
    """A run that a figure needs."""

    task: Task
    optimizer: str
    rate: float = 1.0
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of the run in the store."""
        return name(key_of(*self))

    @property
    def group(self) -> str:
        """Names the runs that share its compiled programs."""
        return name(key_of(self.task, self.optimizer, 0.0, 0))


def final(run: Run, part: str = "validation") -> float:
    """Returns the last loss of validation or of training, infinite for a run that diverged."""
    loss: float = run[part]["loss"][-1]
    return math.inf if run["diverged"] or math.isnan(loss) else loss


def first(run: Run, target: float) -> int | None:
    """Returns the first step at which a run is at or below a validation loss, if there is one."""
    points = zip(run["validation"]["step"], run["validation"]["loss"], strict=True)
    return next((step for step, loss in points if loss <= target), None)


def tuned(
    task: Task, optimizer: str, seeds: Sequence[int], runs: dict[str, Run], part: str = "validation"
) -> list[Need]:
    """Returns the runs of a grid with the first seed, and of its best rate with the others.

    Each part is known once the one before is there. A grid whose best rate is at its end grows.

    Args:
      task: what is trained.
      optimizer: one of :data:`experiments.optimizers.OPTIMIZERS`.
      seeds: the seeds.
      runs: the finished runs.
      part: whose final loss is to be least, ``validation`` or ``train``.
    """
    rates = list(OPTIMIZERS[optimizer].rates)
    while True:
        grid = [Need(task, optimizer, rate, seeds[0]) for rate in rates]
        if any(need.name not in runs for need in grid):
            return grid
        best = min(grid, key=lambda need: final(runs[need.name], part))
        at = rates.index(best.rate)
        if 0 < at < len(rates) - 1 or len(rates) == 1 or len(rates) == LONGEST_GRID:
            return [*grid, *(best._replace(seed=seed) for seed in seeds[1:])]
        if at:
            rates.append(_rounded(10 * rates[-2]))
        else:
            rates.insert(0, _rounded(rates[1] / 10))


def _rounded(rate: float) -> float:
    """Returns a rate without the rounding of a product."""
    return float(f"{rate:.3g}")


def best_runs(
    task: Task, optimizer: str, seeds: Sequence[int], runs: dict[str, Run], part: str = "validation"
) -> list[Run]:
    """Returns the runs of the best rate, as far as they are there, the first seed's first."""
    needs = [need for need in tuned(task, optimizer, seeds, runs, part) if need.name in runs]
    if not needs:
        return []
    rate = min(needs, key=lambda need: final(runs[need.name], part)).rate
    return [runs[need.name] for need in needs if need.rate == rate]


def best_of_grid(task: Task, optimizer: str, runs: dict[str, Run]) -> Run | None:
    """Returns the run of seed 0 at the best rate, None until its whole grid is there."""
    needs = tuned(task, optimizer, (0,), runs)
    if any(need.name not in runs for need in needs):
        return None
    return min((runs[need.name] for need in needs), key=final)


def there(needs: Iterable[Need], runs: dict[str, Run]) -> list[Run]:
    """Returns the runs that are there."""
    return [runs[need.name] for need in needs if need.name in runs]


def row(found: Sequence[Run], **fields: Any) -> dict[str, Any]:
    """Returns a row of a table: fields of its own, then the results of runs that differ by seed."""
    if any(run["diverged"] for run in found):
        steps = ", ".join(f"{run['train']['step'][-1]:,}" for run in found if run["diverged"])
        return {**fields, "train loss": f"diverged by step {steps}"}
    accuracies = [100 * run["validation"]["accuracy"][-1] for run in found]
    return {
        **fields,
        "train loss": spread([final(run, "train") for run in found]),
        "validation loss": spread([final(run) for run in found]),
        "accuracy, %": spread(accuracies, ".1f"),
    }


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Returns the mean, and the range if there are several."""
    if max(values) > 1e6:
        form = ".1e"
    mean = f"{statistics.fmean(values):{form}}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{form}} to {max(values):{form}})"


def table(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Returns rows as a table, with nothing where a row has no such field."""
    import pandas as pd

    return pd.DataFrame(list(rows)).fillna("")


def picture(panels: int, width: float = 4.5, height: float = 4) -> tuple[Picture, list[Axes]]:
    """Returns a picture with panels side by side, more than four in rows of three.

    A cell that is left over is for the legend.
    """
    from matplotlib.figure import Figure as Picture

    columns = 3 if panels > 4 else panels
    rows = -(-panels // columns)
    canvas = Picture(figsize=(width * columns, height * rows), layout="constrained")
    cells = canvas.subplots(rows, columns, squeeze=False).ravel()
    for cell in cells[panels:]:
        cell.set_axis_off()
    axes = list(cells[:panels])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return canvas, axes


def curve(
    axes: Axes,
    found: Sequence[Run],
    part: str,
    column: str,
    *,
    per_epoch: float = 1,
    **style: Any,
) -> None:
    """Draws a column of runs that differ by seed: their mean, and their range as a band.

    Args:
      axes: the panel.
      found: the runs; nothing is drawn without any.
      part: ``train`` or ``validation``.
      column: what is drawn against the step.
      per_epoch: steps per unit of the horizontal axis.
      style: arguments of ``plot``, if other than the colour and the name of the optimiser.
    """
    if not found:
        return
    optimizer = found[0]["key"]["optimizer"]
    length = min(len(run[part][column]) for run in found)
    columns = [run[part][column][:length] for run in found]
    x = [step / per_epoch for step in found[0][part]["step"][:length]]
    diverged = " (diverged)" if any(run["diverged"] for run in found) else ""
    style = {
        "color": COLOURS[optimizer],
        "label": optimizer.replace("_", " ") + diverged,
        "linewidth": 2.2 if optimizer in MAIN else 1.2,
        "zorder": 3 if optimizer in MAIN else 2,
    } | style
    axes.plot(x, [statistics.fmean(values) for values in zip(*columns, strict=True)], **style)
    if len(found) > 1:
        low, high = (list(map(part, zip(*columns, strict=True))) for part in (min, max))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def final_losses(axes: Axes, optimizer: str, losses: Mapping[Any, float]) -> None:
    """Draws the final validation losses of an optimiser against a setting, by its value."""
    style: dict[str, Any] = {"color": COLOURS[optimizer], "label": optimizer.replace("_", " ")}
    axes.plot(list(losses), list(losses.values()), "o-", **style)
    axes.set_ylabel("final validation loss")


def log_axis(axes: Axes, values: Sequence[Any], form: str = "g") -> None:
    """Makes the horizontal axis logarithmic, with these values marked and no others."""
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:{form}}" for value in values])
    axes.minorticks_off()


def losses_of_tasks(
    tasks: Mapping[str, Task], found: Callable[[Task], Iterable[Sequence[Run]]], part: str
) -> tuple[Picture, list[Axes]]:
    """Draws losses against steps, in a panel for each task.

    Args:
      tasks: the tasks by their titles.
      found: the runs of a task, those together that differ by seed.
      part: ``train`` or ``validation``.
    """
    canvas, panels = picture(len(tasks))
    for (title, task), axes in zip(tasks.items(), panels, strict=True):
        for runs in found(task):
            curve(axes, runs, part, "loss")
        name = "training" if part == "train" else part
        axes.set(title=title, xlabel="step", ylabel=f"{name} loss")
    legend(canvas)
    return canvas, panels


def legend(canvas: Picture) -> None:
    """Writes the names of all curves once, in a cell without a panel or below all."""
    entries = {
        label: handle
        for axes in canvas.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    handles, labels = list(entries.values()), list(entries)
    if free := [axes for axes in canvas.axes if not axes.axison]:
        free[0].legend(handles, labels, loc="center", frameon=False)
        return
    columns = min(6, len(entries) or 1)
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
