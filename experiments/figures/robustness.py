"""Far from where anything was tuned: other batches, sizes, labels, losses and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments import tasks
from experiments.figures.runs import (
    Need,
    Run,
    best_of_grid,
    final,
    final_losses,
    legend,
    log_axis,
    picture,
    row,
    table,
    there,
    tuned,
)
from experiments.tasks import Budget, Task

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Picture


class Sweep(NamedTuple):
    """One setting of a task, from very small to very large.

    Attributes:
      title: what is set, in words.
      task: the name of the task.
      setting: what is set.
      values: what it is set to.
      others: what else differs from the task as it is.
    """

    title: str
    task: str
    setting: str
    values: tuple[float | str, ...]
    others: Mapping[str, Any] = {}


STEPS = 300
SCALES = (0.01, 0.1, 1.0, 10.0, 100.0)
DTYPES = ("float32", "bfloat16")


class Robustness:
    """One setting of a task from very small to very large; AdamW keeps the rate tuned before."""

    published = "Nothing: this is our own comparison."
    optimizers = ("agd_spectral_averaged", "agd", "adamw_cosine")

    def sweeps(self, budget: Budget) -> list[Sweep]:
        """Returns what is set, and to what."""
        widths = (64, 128, 256, 512, 1024, 2048)[: None if budget == "gpu" else 5]
        sweeps = [
            Sweep("batch size", "fcn", "batch_size", (16, 64, 256, 1024, 4096)),
            Sweep("depth", "fcn", "depth", (2, 4, 8, 16, 32, 64)),
            Sweep("width of 4 layers", "fcn", "width", widths, {"depth": 4}),
            Sweep("part of labels drawn anew", "mlp", "label_noise", (0.0, 0.2, 0.4, 0.6, 0.8)),
            Sweep("factor of the loss", "fcn", "loss_scale", SCALES),
            Sweep("factor of the loss", "mlp", "loss_scale", SCALES),
            Sweep("dtype", "fcn", "dtype", DTYPES),
            Sweep("dtype", "mlp", "dtype", DTYPES),
        ]
        if budget == "smoke":
            return [sweep._replace(values=sweep.values[:1]) for sweep in sweeps]
        return sweeps

    def task(self, budget: Budget, name: str, **changes: Any) -> Task:
        """Returns a task with some changes."""
        if budget == "smoke":
            small = {"depth": 3, "width": 16, "batch_size": 16, "steps": 4}
            return tasks.create(name, budget, **{**changes, **small})
        return tasks.create(name, budget, steps=STEPS, **changes)

    def grid(self, budget: Budget, task: str, optimizer: str, runs: dict[str, Run]) -> list[Need]:
        """Returns the runs that say the rate of an optimiser on a task."""
        return tuned(self.task(budget, task), optimizer, (0,), runs)

    def of_sweep(
        self, budget: Budget, sweep: Sweep, optimizer: str, runs: dict[str, Run]
    ) -> dict[float | str, Need]:
        """Returns the run of an optimiser for each value, once its rate is known."""
        best = best_of_grid(self.task(budget, sweep.task), optimizer, runs)
        if best is None:
            return {}
        rate = best["key"]["rate"]
        return {
            value: Need(
                self.task(budget, sweep.task, **{sweep.setting: value}, **sweep.others),
                optimizer,
                rate,
            )
            for value in sweep.values
        }

    def needs(self, budget: Budget, runs: dict[str, Run]) -> list[Need]:
        """Returns the grids, and a run of each optimiser for each value of each setting."""
        needs = []
        for sweep in self.sweeps(budget):
            for optimizer in self.optimizers:
                needs += self.grid(budget, sweep.task, optimizer, runs)
                needs += self.of_sweep(budget, sweep, optimizer, runs).values()
        return list(dict.fromkeys(needs))

    def tables(self, budget: Budget, runs: dict[str, Run]) -> list[pd.DataFrame]:
        """Returns a table for each setting, a row for each value and optimiser."""
        return [
            table(
                row([run], **{f"{sweep.task}, {sweep.title}": value}, optimiser=optimizer)
                for optimizer in self.optimizers
                for value, need in self.of_sweep(budget, sweep, optimizer, runs).items()
                for run in there([need], runs)
            )
            for sweep in self.sweeps(budget)
        ]

    def draw(self, budget: Budget, runs: dict[str, Run]) -> Picture:
        """Draws the final validation loss against each setting, a curve for each optimiser."""
        sweeps = self.sweeps(budget)
        canvas, panels = picture(len(sweeps))
        for axes, sweep in zip(panels, sweeps, strict=True):
            for optimizer in self.optimizers:
                needs = self.of_sweep(budget, sweep, optimizer, runs)
                found = {v: final(run) for v, n in needs.items() for run in there([n], runs)}
                final_losses(axes, optimizer, found)
            if sweep.setting not in ("label_noise", "dtype"):
                log_axis(axes, sweep.values)
            axes.set(title=sweep.task, xlabel=sweep.title)
        legend(canvas)
        return canvas
