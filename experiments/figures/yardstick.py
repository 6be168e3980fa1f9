"""Our own comparison of all optimisers, and the check that its language model is the usual one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from experiments import tasks
from experiments.figures.runs import (
    COLOURS,
    Need,
    Run,
    best_runs,
    curve,
    final,
    first,
    five_tasks,
    legend,
    losses_of_tasks,
    picture,
    row,
    spread,
    table,
    there,
    tuned,
)
from experiments.optimizers import OPTIMIZERS
from experiments.tasks import Budget, Task

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Picture

SEEDS = (0, 1, 2)


class Published:
    """The language model against what is published of it: AdamW with warm-up and cosine decay."""

    published = (
        "4 layers, 4 heads, 128 wide, context 64, batch 12, 2,000 steps: validation loss 1.88 "
        "(README of nanoGPT, with the starting weights of GPT-2)."
    )
    # What the published run started from, and what all tasks here start from.
    starts = ("gpt2", "flax")

    def need(self, budget: Budget, start: str, seed: int) -> Need:
        """Returns a run of 2,000 steps."""
        steps = 10 if budget == "smoke" else 2000
        task = tasks.create("gpt", budget, steps=steps, start=start)
        return Need(task, "adamw_cosine", 1e-3, seed)

    def needs(self, budget: Budget, runs: dict[str, Run]) -> list[Need]:
        """Returns three runs for each kind of starting weights."""
        return [self.need(budget, start, seed) for start in self.starts for seed in SEEDS]

    def found(self, budget: Budget, runs: dict[str, Run]) -> dict[str, list[Run]]:
        """Returns the runs that are there, for each kind of starting weights."""
        found = {
            start: there((self.need(budget, start, seed) for seed in SEEDS), runs)
            for start in self.starts
        }
        return {start: those for start, those in found.items() if those}

    def tables(self, budget: Budget, runs: dict[str, Run]) -> list[pd.DataFrame]:
        """Returns a row for each kind of starting weights."""
        found = self.found(budget, runs).items()
        return [table(row(those, **{"starting weights": start}) for start, those in found)]

    def draw(self, budget: Budget, runs: dict[str, Run]) -> Picture:
        """Draws the validation losses."""
        canvas, (axes,) = picture(1, 6)
        for start, those in self.found(budget, runs).items():
            dashes = "--" if start == "gpt2" else "-"
            label = f"adamw cosine, from {start}'s weights"
            curve(axes, those, "validation", "loss", linestyle=dashes, label=label)
        axes.axhline(1.88, color="black", linewidth=0.8, linestyle=":", label="published")
        axes.set(title="gpt", xlabel="step", ylabel="validation loss", ylim=(1.6, 2.6))
        legend(canvas)
        return canvas


class Yardstick:
    """Steps and seconds to the final validation loss of the best tuned AdamW with cosine decay."""

    published = "Nothing: this is our own comparison."
    reference = "adamw_cosine"
    # Not the paper's Adam, which AdamW is with hardly any weight decay, nor variants of AGD. First
    # AGD and the reference, on all tasks.
    optimizers = (
        *("agd", "adamw_cosine", "agd_spectral_averaged", "agd_spectral", "agd_averaged"),
        *("muon_cosine", "schedule_free_adamw", "schedule_free_muon"),
        *("prodigy", "mechanic", "dowg", "adamw", "muon", "sgd"),
    )

    def tasks(self, budget: Budget) -> Iterable[Task]:
        """Returns the five tasks."""
        return five_tasks(budget)

    def needs(self, budget: Budget, runs: dict[str, Run]) -> list[Need]:
        """Returns the grid of each optimiser on each task, and three seeds of the best rate."""
        return [
            need
            for optimizer in self.optimizers
            for task in self.tasks(budget)
            for need in tuned(task, optimizer, SEEDS, runs)
        ]

    def target(self, task: Task, runs: dict[str, Run]) -> float:
        """Returns the validation loss that is to be reached, NaN if it is not there yet."""
        found = best_runs(task, self.reference, SEEDS, runs)
        return statistics.fmean(map(final, found)) if found else math.nan

    def tables(self, budget: Budget, runs: dict[str, Run]) -> list[pd.DataFrame]:
        """Returns a table over tasks and optimisers, and the geometric means over the tasks."""
        rows, ratios = [], []
        for task in self.tasks(budget):
            target, reference, device = self.target(task, runs), None, None
            for optimizer in sorted(self.optimizers, key=lambda name: name != self.reference):
                found = best_runs(task, optimizer, SEEDS, runs)
                if not found:
                    continue
                # The least, as other programs may have run beside some; all on one kind of device.
                alone = [run for run in found if "seconds_per_step" in run]
                if optimizer == self.reference and alone:
                    device = alone[0]["device"]
                seconds = [run["seconds_per_step"] for run in alone if run["device"] == device]
                per_step = min(seconds, default=None)
                if optimizer == self.reference:
                    reference = per_step
                steps = [step for run in found if (step := first(run, target))]
                fields = row(found, task=task.name, optimiser=optimizer, **self.rate_of(found))
                if steps:
                    mean = statistics.fmean(steps)
                    fields["steps to target"] = f"{spread(steps, ',.0f')}"
                    if len(steps) < len(found):
                        fields["steps to target"] += f", {len(steps)} of {len(found)} runs"
                    if per_step:
                        fields["seconds to target"] = f"{mean * per_step:.1f}"
                rows.append(fields)
                if math.isnan(target):
                    continue
                ratio: dict[str, Any] = {"task": task.name, "optimiser": optimizer}
                ratio["loss"] = statistics.fmean(map(final, found)) / target
                if len(steps) == len(found):
                    ratio["steps"] = mean / task.steps
                    if per_step and reference:
                        ratio["seconds"] = ratio["steps"] * per_step / reference
                ratios.append(ratio)
        return [table(rows), self.means(ratios)]

    def rate_of(self, found: list[Run]) -> dict[str, str]:
        """Returns the best rate, for an optimiser that has several to choose from."""
        key = found[0]["key"]
        several = len(OPTIMIZERS[key["optimizer"]].rates) > 1
        return {"rate": f"{key['rate']:g}" if several else ""}

    def means(self, ratios: list[dict[str, Any]]) -> pd.DataFrame:
        """Returns the geometric means over the tasks, relative to the reference.

        Those of steps and seconds are over the tasks on which all runs reached the target.
        """
        rows = []
        for optimizer in self.optimizers:
            of_it = [ratio for ratio in ratios if ratio["optimiser"] == optimizer]
            fields: dict[str, Any] = {"optimiser": optimizer, "tasks": len(of_it)}
            reached = [ratio for ratio in of_it if "steps" in ratio]
            timed = [ratio for ratio in of_it if "seconds" in ratio]
            fields["target reached on"] = len(reached)
            for column, those in (("loss", of_it), ("steps", reached), ("seconds", timed)):
                if those:
                    mean = statistics.geometric_mean(ratio[column] for ratio in those)
                    fields[f"{column}, of the reference's"] = f"{mean:.3f}"
            rows.append(fields)
        return table(rows)

    def draw(self, budget: Budget, runs: dict[str, Run]) -> Picture:
        """Draws the validation losses of all optimisers against steps, a panel for each task."""
        its = {task.name: task for task in self.tasks(budget)}
        found = {
            title: [best_runs(task, name, SEEDS, runs) for name in self.optimizers]
            for title, task in its.items()
        }
        canvas, panels = losses_of_tasks(its, lambda task: found[task.name], "validation")
        for task, axes in zip(its.values(), panels, strict=True):
            target = self.target(task, runs)
            if math.isfinite(target):
                axes.axhline(target, color=COLOURS[self.reference], linewidth=0.8, linestyle=":")
                lowest = min(final(run) for those in found[task.name] for run in those)
                axes.set_ylim(0.95 * lowest, 1.5 * target)
        return canvas
